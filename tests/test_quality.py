import json

import pytest
import torch
from shared import MODEL, SHARED, needs_model, needs_shared
from tiny import tiny_model

from lib import LanguageModel, Problem, RunError, allocate, find_source, layer_quality, load_model


@needs_model
@needs_shared
def test_embedded_model_agrees_with_the_published_estimator():
    """All 210 matrices to 1e-3 relative, and the block-wise sparsities that follow."""
    reference = json.loads((SHARED / "reference" / "smollm2-135m.json").read_text())
    model = load_model(find_source("smollm2", str(MODEL.parent)), device="cpu")
    for metric in ("alpha_peak", "alpha_mid"):
        scores = layer_quality(model, metric)
        assert list(scores) == list(reference[metric])
        for name, score in scores.items():
            assert score == pytest.approx(reference[metric][name], rel=1e-3), (metric, name)
        if metric == "alpha_peak":
            sizes, blocks = {m.name: m.size for m in model.matrices}, {m.name: m.block for m in model.matrices}
            found = allocate("ww", Problem(sizes, blocks, 0.5, scores, 0.2))
            for key, expected in reference["sparsity_block_wise_alpha_peak_S0.5_eps0.2"].items():
                block = int(key.split()[1])
                name = next(m.name for m in model.matrices if m.block == block)
                assert found[name] == pytest.approx(expected, abs=1e-4), key


def test_a_degenerate_matrix_takes_its_blocks_mean_and_is_noted():
    model, events = LanguageModel(tiny_model("llama")), []
    first = model.matrices[0]
    first.write(torch.zeros(first.shape))
    scores = layer_quality(model, "alpha_peak", events=events)
    others = [scores[m.name] for m in model.matrices_of(0)[1:]]
    assert scores[first.name] == pytest.approx(sum(others) / len(others))
    assert [event["matrix"] for event in events] == [first.name]


def test_no_score_at_all_is_an_error():
    model = LanguageModel(tiny_model("llama"))
    for matrix in model.matrices:
        matrix.write(torch.zeros(matrix.shape))
    with pytest.raises(RunError, match="--WW_metric alpha_peak"):
        layer_quality(model, "alpha_peak")
