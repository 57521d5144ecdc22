"""AlphaPruning: prune a causal LM layer by layer, by the shape of its weight matrices' spectra.

flags -> model -> metric per matrix -> sparsity per matrix -> pruned matrices -> perplexity, accuracies -> results
"""

import functools
import logging
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported says nothing

from lib import cli, results
from lib.analysis import analyze, describe, note, score
from lib.config import RunConfig
from lib.evaluate import sparsity_by_matrix
from lib.evaluator import Evaluator
from lib.fisher import row_fisher, row_weights
from lib.gradients import check_differentiable
from lib.inputs import read_inputs
from lib.load import context_length, find_source, load_config, load_tokenizer
from lib.plan import apply_plan, check_plan, plan
from lib.stopwatch import Stopwatch
from lib.windows import with_sampled_windows
from lib.workspace import open_workspace

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
    """Load, score, allocate, prune, evaluate, report."""
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        seqlen = config.window(context_length(load_config(source)))
        tokenizer = load_tokenizer(source)
        inputs = read_inputs(config, tokenizer, seqlen, events)
        workspace = open_workspace(config, clock, events)
        model = workspace.load(source, tokenizer, seqlen)
        model.check(config.pattern, inputs.windows.calibration, inputs.evaluation)
        check_plan(config, model)
        if config.takes_gradients:
            check_differentiable(model)
        described = describe(model, events, source)
    if config.samples_text:
        with clock("sample"):
            inputs = inputs._replace(windows=with_sampled_windows(config, inputs.windows, model, seqlen))
    workspace.begin()
    evaluator = Evaluator(config, inputs, workspace, clock)
    described |= evaluator.bos(events)
    evaluator.measure_dense()

    scores, esds = score(config, model, clock, events) if config.scored or config.plot else ({}, {})
    rows, windows = None, inputs.windows
    if config.weighs_rows:
        with clock("fisher"):
            rows = row_weights(row_fisher(model, windows.calibration, workspace.store, workspace.cached), config.fisher)

    options = {"row_weights": rows, "batch_size": config.batch(seqlen), "store": workspace.store}
    with clock("allocate"):
        allocate = functools.partial(plan, config, model, scores, windows.calibration, windows.held_out)
        planned = workspace.cached("plan", lambda: allocate(cached=workspace.cached, **options))
    events += planned["events"]
    quality = scores[config.ww_metric[0]] if config.scored else planned["scores"]
    describe_run = functools.partial(
        results.PruningRecord, config, described, searches=planned["searches"], clock=clock, events=events
    )
    if config.plan_only:
        return describe_run(results.layer_records(model, quality, planned["targets"])).finish(scores, esds)

    apply_plan(config, model, planned, windows, clock=clock, events=events, **options, **workspace.resume())
    workspace.finish_pruning()

    record = describe_run(results.layer_records(model, quality, planned["targets"], sparsity_by_matrix(model)))
    record.write()
    workspace.save(record.build)
    record.perplexity = evaluator.perplexity()
    record.write()
    record.zero_shot = evaluator.zero_shot()
    final = record.finish(scores, esds)
    workspace.close()
    return final


if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.summary(run(config))))
