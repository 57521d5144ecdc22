"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity -> results
"""

import logging
import sys

from lib import cli, results
from lib.allocation import Problem, allocate
from lib.config import RunConfig
from lib.data import calibration_windows, evaluation_windows
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.load import find_source, load_config, load_model, load_tokenizer, open_model, window_limit
from lib.metrics import METRICS
from lib.model import LanguageModel
from lib.pruners import PRUNERS
from lib.quality import layer_quality
from lib.sequential import prune_model
from lib.stopwatch import Stopwatch

log = logging.getLogger("lib.main")


def run(config: RunConfig) -> dict:
    """One whole run, from flags to results; returns the contents of run.json.

    Raises lib.errors.RunError for whatever the user can put right.
    """
    clock, events = Stopwatch(), []
    for flag in config.without_effect():
        note(events, f"{flag} has no effect on this run")
    results.prepare(config)
    record = (analyze if config.analyze_only else prune)(config, clock, events)
    log.info("results: %s", results.run_folder(config))
    return record


def analyze(config: RunConfig, clock: Stopwatch, events: list[dict]) -> dict:
    """Measure every metric asked for, and stop."""
    with clock("load"):
        model = open_model(find_source(config.model, config.cache_dir, config.trust_remote_code), config.device)
        described = describe(model, events)
    scores, portraits = score(config, model, clock, events)
    layers = [
        {"name": m.name, "block": m.block, "shape": list(m.shape), "scores": {k: v[m.name] for k, v in scores.items()}}
        for m in model.matrices
    ]
    record = results.build_record(config, described, layers, None, clock.seconds(), events)
    folder = results.write_run(config, record)
    if config.plot:
        results.write_report(folder, record, scores, portraits)
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
        if pruner.needs != "nothing":
            calibration = calibration_windows(
                config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed
            )
        if config.eval_wikitext:
            evaluation = evaluation_windows(config.eval_data, tokenizer, seqlen=seqlen, limit=config.eval_windows)
        model = load_model(source, config.device, config.dtype, tokenizer)
        model.check(config.pattern, calibration, evaluation)
        described, batch = describe(model, events), config.batch(seqlen)

    dense = None
    if config.eval_dense:
        with clock("evaluate"):
            dense = perplexity(model, evaluation, batch_size=batch, what="perplexity, dense")
        log.info("perplexity before pruning: %.4f", dense)

    scores, portraits, metric = {}, {}, config.ww_metric[0]
    if config.scored or config.plot:
        scores, portraits = score(config, model, clock, events)
    quality = scores[metric] if config.scored else {}

    with clock("allocate"):
        problem = Problem(
            sizes={matrix.name: matrix.size for matrix in model.matrices},
            blocks={matrix.name: matrix.block for matrix in model.matrices},
            sparsity=config.sparsity,
            scores={name: METRICS[metric].sign * value for name, value in quality.items()},
            epsilon=config.epsilon,
            mapping=config.mapping_type,
        )
        targets = allocate(config.allocation, problem, config.pattern.group, events=events)

    if config.sparsity > 0:
        variant = pruner.variant if config.use_variant else pruner
        prune_model(model, variant, targets, config.pattern, calibration, batch_size=batch, clock=clock, events=events)

    layers = results.layer_records(model, quality, targets, sparsity_by_matrix(model))
    measured = None
    record = results.build_record(config, described, layers, measured, clock.seconds(), events)
    folder = results.write_run(config, record)  # once now, so that nothing is lost if what follows fails
    if config.save_model:
        with clock("save"):
            results.save_checkpoint(model, config.save_model, record)

    if evaluation is not None:
        with clock("evaluate"):
            pruned = perplexity(model, evaluation, batch_size=batch, what="perplexity, pruned")
        measured = {
            "dataset": config.eval_data, "split": "evaluation", "seqlen": seqlen, "windows": len(evaluation),
            "tokens": evaluation.numel(), "dense": dense, "pruned": pruned,
        }  # fmt: skip
    record = results.build_record(config, described, layers, measured, clock.seconds(), events)
    results.write_run(config, record)
    results.append_result(config, record)
    if config.plot:
        results.write_report(folder, record, scores, portraits)
    return record


def describe(model: LanguageModel, events: list[dict]) -> dict:
    """The `model` part of run.json, logged."""
    described = model.describe()
    log.info(
        "%s: %d blocks, %d matrices, %.1f %% of %d parameters prunable, %s on %s", model.name, len(model.blocks),
        len(model.matrices), 100 * model.coverage, model.parameters, described["dtype"], described["device"],
    )  # fmt: skip
    if model.uncovered:
        note(events, f"left dense, of no known kind: {', '.join(model.uncovered)}")
    return described


def score(config: RunConfig, model: LanguageModel, clock: Stopwatch, events: list[dict]) -> tuple[dict, dict]:
    """Every matrix under every metric of the run, and what the pictures show of its spectrum; from the cache what is
    there.
    """
    portraits = {} if config.plot else None
    with clock("metric"):
        cache = results.MetricCache(results.metric_folder(config, model), model, events)
        scores = layer_quality(model, *config.ww_metric, cache=cache, portraits=portraits, events=events)
    return scores, portraits


def note(events: list[dict], message: str) -> None:
    log.warning("%s", message)
    events.append({"matrix": None, "message": message})


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
