"""Fisher information of rows: against gradients taken window by window, and what a pruner makes of it."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, prune_model
from lib.fisher import MIN_FISHER, row_fisher, row_weights
from lib.sequential import walk

pytestmark = pytest.mark.usefixtures("exact_gradients")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_mean_squared_gradient_of_each_row(architecture):
    """transformers' own loss, the mean over a window's predicted tokens, differentiated window by window."""
    hf, tokens = tiny_model(architecture), tiny_tokens()
    model = LanguageModel(hf)
    found = row_fisher(model, tokens)
    expected = {m.name: torch.zeros(m.shape[0], dtype=torch.float64) for m in model.matrices}
    for parameter in hf.parameters():
        parameter.requires_grad_(True)
    for window in tokens:
        hf.zero_grad()
        (hf(input_ids=window[None], labels=window[None]).loss * (len(window) - 1)).backward()
        for m in model.matrices:
            expected[m.name] += m.view(m.stored.grad).double().square().mean(1) / len(tokens)
    for name, rows in expected.items():
        assert found[name].double().tolist() == pytest.approx(rows.tolist(), rel=1e-3, abs=1e-12), name
        assert rows.any() or architecture == "mixtral"


def test_gradients_leave_no_trace():
    model, tokens = LanguageModel(tiny_model("llama")), tiny_tokens()
    before = {m.name: m.weight.clone() for m in model.matrices}
    row_fisher(model, tokens)
    assert all(torch.equal(m.weight, before[m.name]) for m in model.matrices)
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def test_weights_of_rows_worked_by_hand():
    weights = row_weights({"a": torch.tensor([1.0, 9.0, 0.0, 2.0]), "unused": torch.zeros(2)}, 0.5)
    assert weights["a"].tolist() == pytest.approx([3**-0.25, 3**0.25, MIN_FISHER**0.25, (2 / 3) ** 0.25])
    assert weights["unused"].tolist() == [1.0, 1.0]
    assert row_weights({"a": torch.tensor([1.0, 9.0])}, 0.0)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_the_weighted_error_is_what_is_minimised(method):
    """Outputs that weigh more keep more weights, and the error with those weights is the smaller for it."""
    tokens, rows = tiny_tokens(), {}
    weighted, kept = {}, {}
    for given in (False, True):
        model = LanguageModel(tiny_model("llama"))
        step = next(walk(model, tokens, "gram"))  # the first block's inputs, which no pruning has changed
        dense = {m.name: m.weight.clone() for m in step.matrices}
        generator = torch.Generator().manual_seed(0)
        rows = {m.name: torch.rand(m.shape[0], generator=generator) * 4 + 0.1 for m in model.matrices}
        targets = {m.name: 0.5 for m in model.matrices}
        prune_model(model, PRUNERS[method], targets, Pattern(), tokens, row_weights=rows if given else None)
        for m in step.matrices:
            gap = (m.weight - dense[m.name]) * rows[m.name][:, None]
            weighted[m.name, given] = float((gap @ step.stats[m.name].gram * gap).sum())
            heavy = rows[m.name] > rows[m.name].median()
            kept[m.name, given] = float((m.weight[heavy] != 0).float().mean())
            assert float((m.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    for name in dense:
        assert weighted[name, True] < weighted[name, False]
        assert kept[name, True] > kept[name, False] + 0.05
