"""Attribution of a change of the loss to matrices: complete, and left no trace."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from lib import LanguageModel, trials
from lib.attribution import attribute
from lib.evaluate import perplexity
from lib.trials import Trials

pytestmark = pytest.mark.usefixtures("exact_gradients")


def smooth(architecture: str) -> LanguageModel:
    """A model whose loss has no jumps: every token goes to every expert."""
    hf = tiny_model(architecture)
    for module in hf.modules():
        if hasattr(module, "top_k"):
            module.top_k = 4
    return LanguageModel(hf)


def moved(model: LanguageModel, by: float, only: str | None = None) -> dict:
    generator = torch.Generator().manual_seed(0)
    noise = {m: torch.randn(m.shape, generator=generator) for m in model.matrices}
    return {m: m.weight + by * noise[m] * (only in (None, m.name)) for m in model.matrices}


def attributed(model: LanguageModel, before: dict, after: dict, tokens: torch.Tensor, batch_size: int) -> dict:
    for m, weight in after.items():
        m.write(weight)
    return attribute(model, before, tokens, batch_size=batch_size)


def loss_at(model: LanguageModel, weights: dict, tokens: torch.Tensor) -> float:
    before = {m: m.weight.clone() for m in model.matrices}
    for m, weight in weights.items():
        m.write(weight)
    loss = torch.tensor(perplexity(model, tokens, batch_size=2)).log()
    for m, weight in before.items():
        m.write(weight)
    return float(loss)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "falcon"])
def test_parts_sum_to_the_change_of_the_loss(architecture):
    model, tokens = smooth(architecture), tiny_tokens()
    before, after = (moved(model, by) for by in (0.002, 0.004))
    change = loss_at(model, after, tokens) - loss_at(model, before, tokens)
    half_way = {m.name: (before[m] + after[m]) / 2 for m in model.matrices}
    parts = attributed(model, before, after, tokens, 2)
    assert sum(parts.values()) == pytest.approx(change, rel=0.02, abs=2e-6)
    assert all(torch.equal(m.weight, half_way[m.name]) for m in model.matrices)
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_matrix_that_moves_alone_accounts_for_all(architecture):
    model, tokens = smooth(architecture), tiny_tokens()
    for matrix in model.matrices[1::5]:
        before, after = (moved(model, by, matrix.name) for by in (0.0, 0.002))
        change = loss_at(model, after, tokens) - loss_at(model, before, tokens)
        with model.restored():
            parts = attributed(model, before, after, tokens, 3)
        assert parts.pop(matrix.name) == pytest.approx(change, rel=0.02, abs=2e-6)
        assert all(part == 0.0 for part in parts.values())


@pytest.mark.parametrize(
    ("found", "chosen"), [([9.0], 0.6), ([11.0, 9.0], 0.3), ([10.0, 10.0, 9.0], 0.15), ([11.0, 11.0, 11.0], 0.0)]
)
def test_a_strength_that_does_worse_than_uniform_is_halved(found, chosen, monkeypatch):
    """Where uniform sparsities have a perplexity of 10."""
    pruned, values = [], iter(found)
    monkeypatch.setattr(trials, "perplexity", lambda *_, **__: next(values))
    model, windows = LanguageModel(tiny_model("llama")), tiny_tokens()
    trial = Trials(model, lambda targets, *_, **__: pruned.append(targets["all"]), windows, windows, 2)
    record = trial.backtrack("search_strength", 0.6, lambda value: ({"all": value}, 0.0), 10.0)
    assert record["chosen"] == chosen
    assert [one["value"] for one in record["tried"]] == pruned == [0.6, 0.3, 0.15][: len(found)]
    assert [one["perplexity"] for one in record["tried"]] == found
