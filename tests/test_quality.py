import dataclasses
import json
import math

import pytest
import torch
from shared import SHARED, needs_model, needs_shared
from tiny import tiny_model

from lib import LanguageModel, Problem, RunError, allocate, find_source, layer_quality, load_model
from lib.metrics import METRICS
from lib.metrics.base import Metric
from lib.results import MetricCache


@needs_model
@needs_shared
def test_embedded_model_agrees_with_the_published_estimator(embedded):
    """All 210 matrices to 1e-3 relative, and the block-wise sparsities that follow."""
    reference = json.loads((SHARED / "reference" / "smollm2-135m.json").read_text())
    model = load_model(find_source(str(embedded)), device="cpu")
    found_scores = layer_quality(model, "alpha_peak", "alpha_mid")
    for metric, scores in found_scores.items():
        assert list(scores) == list(reference[metric])
        for name, score in scores.items():
            assert score == pytest.approx(reference[metric][name], rel=1e-3), (metric, name)
        if metric == "alpha_peak":
            sizes, blocks = {m.name: m.size for m in model.matrices}, {m.name: m.block for m in model.matrices}
            found = allocate("ww", Problem(sizes, blocks, 0.5, scores, options={"epsilon": 0.2}))
            for key, expected in reference["sparsity_block_wise_alpha_peak_S0.5_eps0.2"].items():
                block = int(key.split()[1])
                name = next(m.name for m in model.matrices if m.block == block)
                assert found[name] == pytest.approx(expected, abs=1e-4), key


def test_a_degenerate_matrix_takes_its_blocks_mean_and_is_noted():
    model, events = LanguageModel(tiny_model("llama")), []
    first = model.matrices[0]
    first.write(torch.zeros(first.shape))
    scores = layer_quality(model, "alpha_peak", events=events)["alpha_peak"]
    others = [scores[m.name] for m in model.matrices_of(0)[1:]]
    assert scores[first.name] == pytest.approx(sum(others) / len(others))
    assert [event["matrix"] for event in events] == [first.name]


def test_no_score_at_all_is_an_error():
    model = LanguageModel(tiny_model("llama"))
    for matrix in model.matrices:
        matrix.write(torch.zeros(matrix.shape))
    with pytest.raises(RunError, match="--WW_metric alpha_peak"):
        layer_quality(model, "alpha_peak")


def test_metrics_share_one_decomposition(monkeypatch):
    from lib import esd

    calls, original = [], esd.squared_singular_values
    monkeypatch.setattr(esd, "squared_singular_values", lambda weight: (calls.append(1), original(weight))[1])
    model = LanguageModel(tiny_model("llama"))
    names = [name for name in METRICS if name not in ("farms", "mp_softrank", "random_distance")]
    scores = layer_quality(model, *names, esds={})
    assert len(calls) == len(model.matrices)
    assert list(scores) == names


def test_a_killed_analysis_goes_on_where_it_was(tmp_path, monkeypatch):
    """An interrupt at the tenth matrix: nine are kept, and the second run measures the other twelve."""
    model, scored = LanguageModel(tiny_model("llama")), []
    real = METRICS["alpha_mid"]

    def score(spectrum):
        scored.append(1)
        if len(scored) == 10:
            raise KeyboardInterrupt
        return real.score(spectrum)

    monkeypatch.setitem(METRICS._entries, "alpha_mid", dataclasses.replace(real, score=score))
    with pytest.raises(KeyboardInterrupt):
        layer_quality(model, "alpha_mid", cache=MetricCache(tmp_path, model))
    again = layer_quality(model, "alpha_mid", cache=MetricCache(tmp_path, model))["alpha_mid"]
    assert len(scored) == 10 + 12
    monkeypatch.undo()
    assert again == layer_quality(model, "alpha_mid")["alpha_mid"]


def test_a_degenerate_matrix_is_cached_as_such(tmp_path):
    model, events = LanguageModel(tiny_model("llama")), []
    model.matrices[4].write(torch.zeros(model.matrices[4].shape))
    first = layer_quality(model, "alpha_peak", cache=MetricCache(tmp_path, model))
    assert layer_quality(model, "alpha_peak", cache=MetricCache(tmp_path, model), events=events) == first
    assert [event["matrix"] for event in events] == [model.matrices[4].name]


def test_nan_names_the_matrix():
    model = LanguageModel(tiny_model("llama"))
    model.matrices[3].weight[2, 2] = torch.nan
    with pytest.raises(RunError, match=model.matrices[3].name):
        layer_quality(model, "stable_rank")


def test_esds_hold_the_histogram_and_the_fit():
    model, esds = LanguageModel(tiny_model("llama")), {}
    scores = layer_quality(model, "stable_rank", "alpha", esds=esds)
    assert list(esds) == list(scores["alpha"])
    for name, esd in esds.items():
        assert esd["alpha"] == scores["alpha"][name]
        assert sum(esd["counts"]) == min(next(m.shape for m in model.matrices if m.name == name))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.5"])
def test_a_metric_that_gives_no_number_ends_in_one_line(value, tmp_path, monkeypatch):
    """And nothing of it is kept."""
    monkeypatch.setitem(METRICS._entries, "odd", Metric(lambda _: value, +1))
    model = LanguageModel(tiny_model("llama"))
    with pytest.raises(RunError, match=r"^--WW_metric odd: gives .* for model\..*, which is no finite number$"):
        layer_quality(model, "odd", cache=MetricCache(tmp_path, model))
    assert not list(tmp_path.rglob("odd.json"))
