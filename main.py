"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity -> results
"""

import logging
import sys

from lib import cli, ranks, results, tokens
from lib.analysis import analyze, describe, note, score, weigh_bos
from lib.config import RunConfig
from lib.data import evaluation_windows
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.fisher import row_fisher, row_weights
from lib.load import find_source, load_config, load_model, load_tokenizer, open_model, window_limit
from lib.plan import carry_out, plan
from lib.stopwatch import Stopwatch
from lib.storage import settle
from lib.windows import windows_of_model, windows_of_text

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
    # The texts before the weights: a corpus that is missing or too short ends the run early.
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        seqlen = config.window(window_limit(load_config(source)))
        tokenizer = load_tokenizer(source)
        windows = windows_of_text(config, tokenizer, seqlen)
        evaluation = None
        if config.eval_wikitext:
            evaluation = evaluation_windows(
                config.eval_data, tokenizer, seqlen=seqlen, limit=config.eval_windows, add_bos=config.add_bos,
                cache_dir=config.cache_dir,
            )  # fmt: skip
            ranks.enough(f"--eval_windows {len(evaluation)}", evaluation)
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
        described, batch = describe(model, events, source), config.batch(seqlen)

    if config.writes_own_text:
        with clock("sample"):
            windows = windows_of_model(config, model, seqlen)
    watched = windows.calibration if evaluation is None else evaluation
    if watched is not None:
        log.info("%s", tokens.beginnings(tokenizer, config.add_bos == "every"))
    journal = results.Journal(config, model) if config.stream else None
    remember = journal.recall if journal else lambda _, make: make()

    def evaluate(what: str) -> float:
        with clock("evaluate"):
            return perplexity(model, evaluation, batch_size=batch, what=f"perplexity, {what}", store=store)

    store = results.activation_store(config)
    if watched is not None and config.add_bos == "once":
        with clock("evaluate"):
            described["bos"] = weigh_bos(model, watched, events, store, remember)
    dense = remember("dense", lambda: evaluate("dense")) if config.eval_dense else None
    if dense is not None:
        log.info("perplexity before pruning: %.4f", dense)

    scores, portraits = {}, {}
    if config.scored or config.plot:
        scores, portraits = score(config, model, clock, events)

    rows = None
    if config.fisher:
        with clock("fisher"):
            rows = row_weights(row_fisher(model, windows.calibration), config.fisher)

    with clock("allocate"):
        planned = remember(
            "plan",
            lambda: plan(
                config, model, scores, windows.calibration, windows.held_out, row_weights=rows, batch_size=batch,
                store=store,
            ),
        )  # fmt: skip
    targets = planned["targets"]
    events += planned["events"]

    resumable = {}
    if journal:
        journal.reread(journal.done)
        events += journal.events
        resumable = {"done": journal.done, "commit": journal.commit, "store": store}
    carry_out(
        config, model, planned, windows, row_weights=rows, batch_size=batch, clock=clock, events=events, **resumable
    )
    for message in settle(model.rest(), model.saved_as):
        note(events, message)
    if journal:
        journal.finish()

    quality = scores[config.ww_metric[0]] if config.scored else planned["scores"]
    layers = results.layer_records(model, quality, targets, sparsity_by_matrix(model))
    measured = None
    record = results.build_record(config, described, layers, measured, clock.seconds(), events, planned["searches"])
    folder = results.write_run(config, record)  # once now, so that nothing is lost if what follows fails
    if config.save_model and not journal:
        with clock("save"):
            results.save_checkpoint(model, config.save_model, record)

    if evaluation is not None:
        measured = {
            "dataset": config.eval_data, "split": "evaluation", "seqlen": seqlen, "windows": len(evaluation),
            "tokens": evaluation.numel(), "dense": dense, "pruned": evaluate("pruned"),
        }  # fmt: skip
    record = results.build_record(config, described, layers, measured, clock.seconds(), events, planned["searches"])
    results.write_run(config, record)
    results.append_result(config, record)
    if config.plot:
        results.write_report(folder, record, scores, portraits)
    if config.save_model:
        results.describe_checkpoint(config, record)
    if journal:
        journal.close()
    return record


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
