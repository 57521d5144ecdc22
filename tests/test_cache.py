"""The metric cache: keyed by the weights, refused for others', grown as the analysis goes on."""

import json

import numpy as np
import pytest
from tiny import tiny_model

from lib import LanguageModel, RunError
from lib.results import MetricCache


@pytest.fixture
def model():
    return LanguageModel(tiny_model("llama"))


@pytest.fixture
def values(model):
    return {matrix.name: 2.0 + i for i, matrix in enumerate(model.matrices)}


def fill(folder, model, values) -> None:
    cache = MetricCache(folder, model)
    cache.read("alpha_peak", 1)
    for name, value in values.items():
        cache.add(name, {"alpha_peak": value})
    cache.write()


def test_what_was_written_is_read(tmp_path, model, values):
    fill(tmp_path, model, values)
    assert MetricCache(tmp_path, model).read("alpha_peak", 1) == values
    assert MetricCache(tmp_path, model).read("alpha_mid", 1) == {}


def test_half_a_cache_is_half_the_work(tmp_path, model, values):
    half = dict(list(values.items())[:9])
    fill(tmp_path, model, half)
    assert MetricCache(tmp_path, model).read("alpha_peak", 1) == half


def test_values_reach_the_disk_while_the_cache_grows(tmp_path, model, monkeypatch):
    monkeypatch.setattr("lib.results.cache.SECONDS", 0.0)
    cache = MetricCache(tmp_path, model)
    cache.read("alpha_peak", 1)
    for i, matrix in enumerate(model.matrices[:3]):
        cache.add(matrix.name, {"alpha_peak": float(i)})
        assert len(json.loads((tmp_path / "alpha_peak.json").read_text())["values"]) == i + 1


def test_dtype_does_not_change_the_model(model):
    half = LanguageModel(tiny_model("llama").half())
    again = LanguageModel(tiny_model("llama").half().float())
    assert model.digest == half.digest == again.digest


def test_other_weights_are_refused(tmp_path, model, values):
    fill(tmp_path, model, values)
    other = LanguageModel(tiny_model("llama", seed=5))
    with pytest.raises(RunError, match=r"--WW_metric_cache .* another model"):
        MetricCache(tmp_path, other).read("alpha_peak", 1)


def test_an_earlier_definition_is_computed_again(tmp_path, model, values):
    fill(tmp_path, model, values)
    assert MetricCache(tmp_path, model).read("alpha_peak", 2) == {}


def test_published_array_is_taken_in_module_order_with_a_warning(tmp_path, model, values):
    np.save(tmp_path / "alpha_peak.npy", np.array(list(values.values())))
    events: list[dict] = []
    assert MetricCache(tmp_path, model, events).read("alpha_peak", 1) == values
    assert "nothing in it says" in events[0]["message"]


@pytest.mark.parametrize("array", [np.ones(20), np.ones((21, 1)), np.full(21, np.nan), np.array(["x"] * 21)])
def test_array_that_does_not_fit_is_refused(tmp_path, model, array):
    np.save(tmp_path / "alpha_peak.npy", array)
    with pytest.raises(RunError, match="--WW_metric_cache"):
        MetricCache(tmp_path, model).read("alpha_peak", 1)


def test_pickled_array_is_not_executed(tmp_path, model):
    np.save(tmp_path / "alpha_peak.npy", np.array([{"a": 1}] * 21), allow_pickle=True)
    with pytest.raises(RunError, match="plain array"):
        MetricCache(tmp_path, model).read("alpha_peak", 1)
