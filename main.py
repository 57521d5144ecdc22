"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity -> results
"""

import logging
import sys

from lib import cli, results
from lib.allocation import ALLOCATIONS, Problem, allocate
from lib.config import RunConfig
from lib.data import calibration_windows, evaluation_windows
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.load import find_source, load_config, load_model, load_tokenizer, window_limit
from lib.metrics import METRICS
from lib.pruners import PRUNERS
from lib.quality import layer_quality
from lib.sequential import prune_model
from lib.stopwatch import Stopwatch

log = logging.getLogger("lib.main")


def run(config: RunConfig) -> dict:
    """One whole run, from flags to results; returns the contents of run.json.

    Raises lib.errors.RunError for whatever the user can put right.
    """
    clock, events, pruner = Stopwatch(), [], PRUNERS[config.pruner]
    for flag in config.without_effect():
        events.append({"matrix": None, "message": f"{flag} has no effect on this run"})
        log.warning("%s", events[-1]["message"])
    results.prepare(config)

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
        described, batch = model.describe(), config.batch(seqlen)
    log.info(
        "%s: %d blocks, %d matrices, %.1f %% of %d parameters prunable, %s on %s", model.name, len(model.blocks),
        len(model.matrices), 100 * model.coverage, model.parameters, described["dtype"], described["device"],
    )  # fmt: skip

    if model.uncovered:
        events.append({"matrix": None, "message": f"left dense, of no known kind: {', '.join(model.uncovered)}"})
        log.warning("%s", events[-1]["message"])

    dense = None
    if config.eval_dense:
        with clock("evaluate"):
            dense = perplexity(model, evaluation, batch_size=batch, what="perplexity, dense")
        log.info("perplexity before pruning: %.4f", dense)

    scores: dict[str, float] = {}
    if ALLOCATIONS[config.allocation].needs_scores:
        with clock("metric"):
            folder = results.metric_cache(config, model)
            scores = results.read_metric(folder, model, config.ww_metric, events)
            if scores is None:
                scores = layer_quality(model, config.ww_metric, events=events)
                results.write_metric(folder, model, config.ww_metric, scores)

    with clock("allocate"):
        sizes = {matrix.name: matrix.size for matrix in model.matrices}
        problem = Problem(
            sizes=sizes,
            blocks={matrix.name: matrix.block for matrix in model.matrices},
            sparsity=config.sparsity,
            scores={name: METRICS[config.ww_metric].sign * score for name, score in scores.items()},
            epsilon=config.epsilon,
            mapping=config.mapping_type,
        )
        targets = allocate(config.allocation, problem, config.pattern.group, events=events)

    if config.sparsity > 0:
        variant = pruner.variant if config.use_variant else pruner
        prune_model(model, variant, targets, config.pattern, calibration, batch_size=batch, clock=clock, events=events)

    reached = sparsity_by_matrix(model)
    layers = [
        {
            "name": matrix.name, "block": matrix.block, "shape": list(matrix.shape), "score": scores.get(matrix.name),
            "target_sparsity": targets[matrix.name], "sparsity": reached[matrix.name],
        }
        for matrix in model.matrices
    ]  # fmt: skip
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
    log.info("results: %s", folder)
    return record


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
