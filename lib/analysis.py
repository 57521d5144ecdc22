"""Measurements of the dense model: metrics of every matrix (all of --analyze_only), and the effect of BOS."""

import logging
import math
from collections.abc import Callable

from torch import Tensor

from . import results, tokens
from .activations import Store
from .config import RunConfig
from .evaluate import bos_effect
from .load import Source, find_source, load_model, open_model
from .model import LanguageModel
from .quality import layer_quality
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)

BOS_HELPS = 0.1  # of the loss, from which on a run without BOS in every window says so


def analyze(config: RunConfig, clock: Stopwatch, events: list[dict]) -> dict:
    """Measure every metric asked for, and stop."""
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        model = (load_model if source.gguf else open_model)(source, config.device, "float32")
        described = describe(model, events, source)
    scores, esds = score(config, model, clock, events)
    layers = [
        {"name": m.name, "block": m.block, "shape": list(m.shape), "scores": {k: v[m.name] for k, v in scores.items()}}
        for m in model.matrices
    ]
    record = results.build_record(config, described, layers, None, clock.seconds(), events)
    folder = results.write_run(config, record)
    if config.plot:
        results.write_report(folder, record, scores, esds)
    return record


def describe(model: LanguageModel, events: list[dict], source: Source) -> dict:
    """The `model` part of run.json, logged."""
    described = model.describe() | {"revision": source.revision}
    log.info(
        "%s: %d blocks, %d matrices, %.1f %% of %d parameters prunable, %s on %s", model.name, len(model.blocks),
        len(model.matrices), 100 * model.coverage, model.parameters, described["dtype"], described["device"],
    )  # fmt: skip
    for message in model.notes:
        note(events, message)
    if model.stays_dense:
        note(events, model.stays_dense)
    return described


def score(config: RunConfig, model: LanguageModel, clock: Stopwatch, events: list[dict]) -> tuple[dict, dict]:
    """(metric -> matrix -> score, matrix -> ESD for the pictures), cached from run to run."""
    esds = {} if config.plot else None
    with clock("metric"):
        cache = results.MetricCache(results.metric_folder(config, model), model, events)
        scores = layer_quality(model, *config.ww_metric, cache=cache, options=config.options, esds=esds, events=events)
    return scores, esds


def measure_bos_effect(
    model: LanguageModel, windows: Tensor, events: list[dict], store: Store | None, cached: Callable
) -> dict | None:
    """The `bos` of run.json's `model`: the loss on the last of the windows with BOS in front and without.

    None where there is no BOS to put there. Where it helps by more than BOS_HELPS, an event says so.
    """
    bos = tokens.bos(model.tokenizer)
    if bos is None or bos >= model.model.get_input_embeddings().weight.shape[0] or windows.shape[1] < 4:
        return None
    losses = cached("bos", lambda: bos_effect(model, windows[-1], bos, store))
    begun, bare = losses["loss_with_bos"], losses["loss_without_bos"]
    if not (math.isfinite(begun) and math.isfinite(bare)):
        return None
    helps = begun < (1 - BOS_HELPS) * bare
    if helps:
        note(
            events,
            f"the model expects BOS in front of every window: its loss on one is {begun:.3f} nats a token with it and "
            f"{bare:.3f} without; give --add_bos every, or the perplexities mean little",
        )
    return losses | {"helps": helps}


def note(events: list[dict], message: str) -> None:
    log.warning("%s", message)
    events.append({"matrix": None, "message": message})
