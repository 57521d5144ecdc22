"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity -> results
"""

import logging
import sys

from lib import cli, ranks, results
from lib.allocation import ALLOCATIONS, Problem, allocate
from lib.analysis import analyze, describe, note, score
from lib.config import RunConfig
from lib.data import calibration_windows, evaluation_windows
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.load import find_source, load_config, load_model, load_tokenizer, open_model, window_limit
from lib.metrics import METRICS
from lib.pruners import PRUNERS
from lib.quality import allocation_scores
from lib.sequential import prune_model
from lib.stopwatch import Stopwatch

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
    pruner = PRUNERS[config.pruner]
    # The texts before the weights: a corpus that is missing or too short ends the run early.
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        seqlen = config.window(window_limit(load_config(source)))
        tokenizer = load_tokenizer(source)
        calibration = evaluation = None
        if config.calibrated:
            calibration = calibration_windows(
                config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed
            )
            ranks.enough("--nsamples", calibration)
        if config.eval_wikitext:
            evaluation = evaluation_windows(config.eval_data, tokenizer, seqlen=seqlen, limit=config.eval_windows)
            ranks.enough("--eval_windows", evaluation)
        if config.stream:
            model = open_model(results.as_safetensors(source), config.device, config.dtype, tokenizer)
            model.load_rest()
        else:
            model = load_model(source, config.device, config.dtype, tokenizer)
        model.check(config.pattern, calibration, evaluation)
        described, batch = describe(model, events), config.batch(seqlen)

    journal = results.Journal(config, model) if config.stream else None
    remember = journal.recall if journal else lambda _, make: make()

    def evaluate(what: str) -> float:
        with clock("evaluate"):
            return perplexity(model, evaluation, batch_size=batch, what=f"perplexity, {what}", store=store)

    store = results.activation_store(config)
    dense = remember("dense", lambda: evaluate("dense")) if config.eval_dense else None
    if dense is not None:
        log.info("perplexity before pruning: %.4f", dense)

    scores, portraits, allocation = {}, {}, ALLOCATIONS[config.allocation]
    if config.scored or config.plot:
        scores, portraits = score(config, model, clock, events)

    def plan() -> dict:
        own, of_blocks, held = {}, {}, []
        if config.scored:
            own = {name: METRICS[metric].sign * value for name, value in scores[metric].items()}
        elif allocation.score:
            own, of_blocks = allocation_scores(
                model, allocation, calibration, config.options, config.mapping_type, batch_size=batch, store=store
            )
        problem = Problem(
            sizes={matrix.name: matrix.size for matrix in model.matrices},
            blocks={matrix.name: matrix.block for matrix in model.matrices},
            shapes={matrix.name: matrix.shape for matrix in model.matrices},
            sparsity=config.sparsity, epsilon=config.epsilon, mapping=config.mapping_type, options=config.options,
            scores=own, block_scores=of_blocks,
        )  # fmt: skip
        targets = allocate(config.allocation, problem, config.pattern.group, events=held)
        return {"targets": targets, "events": held, "scores": own if allocation.granular else {}}

    metric = config.ww_metric[0]
    with clock("allocate"):
        planned = remember("plan", plan)
    targets, quality = planned["targets"], scores[metric] if config.scored else planned["scores"]
    events += planned["events"]

    resumable = {}
    if journal:
        journal.reread(journal.done)
        events += journal.events
        resumable = {"done": journal.done, "commit": journal.commit, "store": store}
    variant = pruner.variant if config.use_variant else pruner
    prune_model(
        model, variant, targets, config.pattern, calibration, batch_size=batch, clock=clock, events=events, **resumable
    )
    if journal:
        journal.finish()

    layers = results.layer_records(model, quality, targets, sparsity_by_matrix(model))
    measured = None
    record = results.build_record(config, described, layers, measured, clock.seconds(), events)
    folder = results.write_run(config, record)  # once now, so that nothing is lost if what follows fails
    if config.save_model and not journal:
        with clock("save"):
            results.save_checkpoint(model, config.save_model, record)

    if evaluation is not None:
        measured = {
            "dataset": config.eval_data, "split": "evaluation", "seqlen": seqlen, "windows": len(evaluation),
            "tokens": evaluation.numel(), "dense": dense, "pruned": evaluate("pruned"),
        }  # fmt: skip
    record = results.build_record(config, described, layers, measured, clock.seconds(), events)
    results.write_run(config, record)
    results.append_result(config, record)
    if config.plot:
        results.write_report(folder, record, scores, portraits)
    if journal:
        journal.close(record)
    return record


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
