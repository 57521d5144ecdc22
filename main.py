"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity, accuracies -> results
"""

import logging
import sys

from lib import cli, results, tokens, zero_shot
from lib.analysis import analyze, describe, note, score, weigh_bos
from lib.config import RunConfig
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.fisher import row_fisher, row_weights
from lib.gradients import check_differentiable
from lib.inputs import read_inputs
from lib.load import find_source, load_config, load_model, load_tokenizer, open_model, window_limit
from lib.plan import carry_out, check_plan, plan
from lib.stopwatch import Stopwatch
from lib.storage import settle
from lib.windows import windows_of_model

log = logging.getLogger("lib.main")


def run(config: RunConfig) -> dict:
    """One whole run, from flags to results; returns the contents of run.json.

    Raises lib.errors.RunError for whatever the user can put right.
    """
    clock, events = Stopwatch(), []
    if unread := config.without_effect():
        note(events, f"without effect on this run: {', '.join(unread)}")
    results.prepare(config)
    record = (analyze if config.analyze_only else prune)(config, clock, events)
    log.info("results: %s", results.run_folder(config))
    return record


def prune(config: RunConfig, clock: Stopwatch, events: list[dict]) -> dict:
    """Allocate, prune, evaluate, save."""
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        seqlen = config.window(window_limit(load_config(source)))
        tokenizer = load_tokenizer(source)
        windows, evaluation, tasks = read_inputs(config, tokenizer, seqlen, events)
        if config.stream:
            source = results.as_safetensors(source)
            model = open_model(source, config.device, config.dtype, tokenizer, config.save_dtype)
            model.load_rest()
        else:
            model = load_model(
                source, config.device, config.dtype, tokenizer, config.save_dtype,
                held_tokens=config.streamed_windows * seqlen, copies=config.copies,
            )  # fmt: skip
        model.check(config.pattern, windows.calibration, evaluation)
        check_plan(config, model)
        if config.takes_gradients:
            check_differentiable(model)
        described, batch = describe(model, events, source), config.batch(seqlen)

    if config.writes_own_text:
        with clock("sample"):
            windows = windows_of_model(config, model, seqlen)
    watched = windows.calibration if evaluation is None else evaluation
    if watched is not None:
        log.info("%s", tokens.beginnings(tokenizer, config.add_bos == "every"))
    journal = results.Journal(config, model) if config.stream and not config.plan_only else None
    remember = journal.recall if journal else lambda _, make: make()

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
            described["bos"] = weigh_bos(model, watched, events, store, remember)
    dense = dense_accuracies = measured = accuracy = None
    if config.eval_dense and evaluation is not None:
        dense = remember("dense", lambda: evaluate("dense"))
        log.info("perplexity before pruning: %.4f", dense)
    if config.eval_dense and tasks:
        dense_accuracies = remember("zero_shot", lambda: accuracies("dense"))

    scores, portraits = {}, {}
    if config.scored or config.plot:
        scores, portraits = score(config, model, clock, events)

    rows = None
    if config.weighs_rows:
        with clock("fisher"):
            rows = row_weights(row_fisher(model, windows.calibration, store, remember), config.fisher)

    with clock("allocate"):
        how = {"row_weights": rows, "batch_size": batch, "store": store}
        planned = remember("plan", lambda: plan(config, model, scores, *windows.of_plan, remember=remember, **how))
    targets = planned["targets"]
    events += planned["events"]
    quality = scores[config.ww_metric[0]] if config.scored else planned["scores"]
    if config.plan_only:
        layers = results.layer_records(model, quality, targets)
        return results.write_plan(config, record(), scores, portraits)

    resumable = {}
    if journal:
        journal.reread(journal.done)
        events += journal.events
        resumable = {"done": journal.done, "commit": journal.commit}
    carry_out(config, model, planned, windows, clock=clock, events=events, **how, **resumable)
    for message in settle(model.rest(), model.saved_as):
        note(events, message)
    if journal:
        journal.finish()

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
        results.write_report(folder, final, scores, portraits)
    if config.save_model:
        results.describe_checkpoint(config, final)
    if journal:
        journal.close()
    return final


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
