import math

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model, tiny_tokens

from lib import LanguageModel, RunError, evaluate, perplexity, sparsity_by_matrix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_is_that_of_the_models_own_loss(architecture, monkeypatch):
    """Against transformers' own loss, window by window, whatever the batch and the chunks of the head."""
    hf, tokens = tiny_model(architecture), tiny_tokens(5, 23)
    with torch.no_grad():
        losses = [hf(window[None], labels=window[None], use_cache=False).loss.item() for window in tokens]
    expected = math.exp(sum(losses) / len(losses))
    for batch_size, elements in ((1, 2**25), (2, 96 * 7), (5, 1)):
        monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", elements)
        assert perplexity(LanguageModel(hf), tokens, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "opt_350m"])  # gemma2 caps its logits softly
def test_logits_are_the_models_own(architecture):
    hf, tokens = tiny_model(architecture), tiny_tokens(2)
    model = LanguageModel(hf)
    with torch.no_grad():
        expected = hf(tokens, use_cache=False).logits
    torch.testing.assert_close(model.logits(model.hidden_states(tokens)), expected)
    assert torch.equal(hf(tokens, use_cache=False).logits, expected)  # the model's forward is its own again


def test_no_more_logits_than_asked_for_exist_at_once(monkeypatch):
    """And each chunk lies as if it were made anew: of a slice the head's product is many times slower in 16 bits."""
    model, chunks = LanguageModel(tiny_model("llama")), []
    own = LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda self, h: chunks.append(h) or own(self, h))
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 96 * 10)
    for batch_size in (1, 2):
        chunks.clear()
        perplexity(model, tiny_tokens(4, 24), batch_size=batch_size)
        assert max(chunk[..., 0].numel() for chunk in chunks) <= 10
        assert sum(chunk[..., 0].numel() for chunk in chunks) == 4 * 23
        assert all(chunk.stride() == torch.empty_like(chunk.clone()).stride() for chunk in chunks)


def test_an_infinite_loss_is_an_error():
    hf = tiny_model("llama")
    hf.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(RunError, match="perplexity"):
        perplexity(LanguageModel(hf), tiny_tokens())


def test_sparsity_is_counted():
    model = LanguageModel(tiny_model("llama"))
    first = model.matrices[0]
    weight = first.weight.clone()
    weight[:, :8] = 0
    first.write(weight)
    found = sparsity_by_matrix(model)
    assert found.pop(first.name) == pytest.approx(8 / weight.shape[1])
    assert set(found.values()) == {0.0}
