"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity, accuracies -> results
"""

import logging
import sys

from lib import cli, results, tokens, zero_shot
from lib.analysis import analyze, describe, measure_bos_effect, note, score
from lib.config import RunConfig
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.fisher import row_fisher, row_weights
from lib.gradients import check_differentiable
from lib.inputs import read_inputs
from lib.load import context_length, find_source, load_config, load_model, load_tokenizer, open_model
from lib.plan import apply_plan, plan
from lib.stopwatch import Stopwatch
from lib.storage import round_to_save_dtypes
from lib.windows import sampled_windows

log = logging.getLogger("lib.main")


def run(config: RunConfig) -> dict:
    """One whole run, from flags to results; returns the contents of run.json.

    Raises lib.errors.RunError for whatever the user can put right.
    """
    clock, events = Stopwatch(), []
    if unread := config.unused_flags():
        note(events, f"without effect on this run: {', '.join(unread)}")
    results.prepare(config)
    record = (analyze if config.analyze_only else prune)(config, clock, events)
    log.info("results: %s", results.run_folder(config))
    return record


def prune(config: RunConfig, clock: Stopwatch, events: list[dict]) -> dict:
    """Allocate, prune, evaluate, save."""
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        seqlen = config.window(context_length(load_config(source)))
        tokenizer = load_tokenizer(source)
        windows, evaluation, tasks = read_inputs(config, tokenizer, seqlen, events)
        if config.stream:
            source = results.convert_to_safetensors(source)
            model = open_model(source, config.device, config.dtype, tokenizer, config.save_dtype)
            model.load_non_blocks()
        else:
            model = load_model(
                source, config.device, config.dtype, tokenizer, config.save_dtype,
                held_tokens=config.streamed_windows * seqlen, copies=config.copies,
            )  # fmt: skip
        model.check(config.pattern, windows.calibration, evaluation)
        if config.takes_gradients:
            check_differentiable(model)
        described, batch = describe(model, events, source), config.batch(seqlen)

    if config.writes_own_text:
        with clock("sample"):
            windows = sampled_windows(config, model, seqlen)
    watched = windows.calibration if evaluation is None else evaluation
    if watched is not None:
        log.info("%s", tokens.describe_prefix(tokenizer, config.add_bos == "every"))
    journal = results.Journal(config, model) if config.stream else None
    cached = journal.cached if journal else lambda _, make: make()

    def evaluate(what: str) -> float:
        with clock("evaluate"):
            return perplexity(model, evaluation, batch_size=batch, what=f"perplexity, {what}", store=store)

    def accuracies(what: str) -> dict:
        with clock("zero-shot"):
            return zero_shot.evaluate(model, tasks, config.batch, store=store, what=f"zero-shot, {what}")

    def record(measured: dict | None = None, accuracy: dict | None = None) -> dict:
        seconds, searches = clock.seconds(), planned["searches"]
        return results.build_record(config, described, layers, measured, seconds, events, searches, accuracy)

    store = results.activation_store(config)
    if watched is not None and config.add_bos == "once":
        with clock("evaluate"):
            described["bos"] = measure_bos_effect(model, watched, events, store, cached)
    dense = dense_accuracies = measured = accuracy = None
    if config.eval_dense and evaluation is not None:
        dense = cached("dense", lambda: evaluate("dense"))
        log.info("perplexity before pruning: %.4f", dense)
    if config.eval_dense and tasks:
        dense_accuracies = cached("zero_shot", lambda: accuracies("dense"))

    scores, esds = {}, {}
    if config.scored or config.plot:
        scores, esds = score(config, model, clock, events)

    rows = None
    if config.weighs_rows:
        with clock("fisher"):
            rows = row_weights(row_fisher(model, windows.calibration, store, cached), config.fisher)

    with clock("allocate"):
        how = {"row_weights": rows, "batch_size": batch, "store": store}
        planned = cached("plan", lambda: plan(config, model, scores, *windows.for_planning, cached=cached, **how))
    targets = planned["targets"]
    events += planned["events"]

    resumable = {}
    if journal:
        journal.use_committed(journal.done)
        events += journal.events
        resumable = {"done": journal.done, "commit": journal.commit}
    apply_plan(config, model, planned, windows, clock=clock, events=events, **how, **resumable)
    for message in round_to_save_dtypes(model.non_block_state(), model.save_dtypes):
        note(events, message)
    if journal:
        journal.finish()

    quality = scores[config.ww_metric[0]] if config.scored else planned["scores"]
    layers = results.layer_records(model, quality, targets, sparsity_by_matrix(model))
    folder = results.write_run(config, record())  # once now, so that nothing is lost if what follows fails
    if config.save_model and not journal:
        with clock("save"):
            results.save_checkpoint(model, config.save_model, record())

    if evaluation is not None:
        measured = {
            "dataset": config.eval_data, "split": "evaluation", "seqlen": seqlen, "windows": len(evaluation),
            "tokens": evaluation.numel(), "dense": dense, "pruned": evaluate("pruned"),
        }  # fmt: skip
        results.write_run(config, record(measured))
    if tasks:
        accuracy = zero_shot.record(tasks, dense=dense_accuracies, pruned=accuracies("pruned"))
    final = record(measured, accuracy)
    results.write_run(config, final)
    results.append_result(config, final)
    if config.plot:
        results.write_report(folder, final, scores, esds)
    if config.save_model:
        results.describe_checkpoint(config, final)
    if journal:
        journal.close()
    return final


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
