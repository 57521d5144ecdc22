"""Recovery of the whole model: the divergence, the optimisation that it is, and what it leaves alone."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_checkpoints import run
from tiny import tiny_model, tiny_tokens
from toy import Block, Toy

from lib import (
    PRUNERS,
    LanguageModel,
    Pattern,
    distillation,
    evaluate,
    find_source,
    plan,
    precision,
    prune_model,
    sampling,
)
from lib.distillation import Divergence, dense_targets, distil, log_probabilities
from lib.load import load_model


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(distillation, "RECIPE", dataclasses.replace(distillation.RECIPE, learning_rate=0.1))


def pruned(model: LanguageModel, group: int | None = None) -> LanguageModel:
    prune_model(model, PRUNERS["magnitude"], {m.name: 0.5 for m in model.matrices}, Pattern(group))
    return model


def test_log_probabilities_of_a_few_tokens_and_the_rest():
    """By hand: of probabilities 1/2, 1/4, 1/8, 1/8 the two largest and what is left; far out nothing is infinite."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3
    found = log_probabilities(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(found.exp(), torch.tensor([0.25, 0.5, 0.25]))
    assert log_probabilities(torch.tensor([0.0, 1e4, 0.0]), torch.tensor([1])).isfinite().all()


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_the_divergence_and_its_gradient_are_those_of_autograd(at_once, monkeypatch):
    """In float64, of logits of which some leave nothing to the others, and some nothing to those told apart."""
    monkeypatch.setattr(distillation, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 40, generator=generator) * torch.tensor([1.0, 4.0, 10.0] * 3)[:, None]
    ids = torch.stack([torch.randperm(40, generator=generator)[:6] for _ in range(9)])
    logits[3].scatter_(0, ids[3], 40.0)
    logits[4].scatter_(0, ids[4], -40.0)
    wanted = torch.randn(9, 7, generator=generator).log_softmax(-1)
    exact = logits.double().requires_grad_()
    rest = exact.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.cat([exact.gather(-1, ids), rest], dim=-1).log_softmax(-1)
    reference = (wanted.double().exp() * (wanted.double() - found)).sum()
    (3 * reference).backward()
    logits.requires_grad_()
    divergence = Divergence.apply(logits, ids, wanted)
    (3 * divergence).backward()
    torch.testing.assert_close(divergence.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_divergence_is_finite_far_out():
    logits = torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    found = Divergence.apply(logits, torch.tensor([[1], [1]]), wanted)
    found.backward()
    assert found.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kept", [32, 95])
@pytest.mark.parametrize("architecture", ["llama_tied", "gemma2", "gpt2"])
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_targets_are_the_models_own_distribution(fast, architecture, kept, monkeypatch):
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: fast)
    monkeypatch.setattr(distillation, "TOP_K", kept)
    model, tokens = LanguageModel(tiny_model(architecture)), tiny_tokens(5)
    targets = dense_targets(model, tokens, batch_size=2)
    with torch.no_grad():
        probabilities = model.model(tokens).logits.double().softmax(-1)
    largest = probabilities.topk(kept).values
    near = {"rtol": 1e-3, "atol": 1e-6} if fast == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(targets.log_probs[..., :-1].double().exp(), largest, **near)
    torch.testing.assert_close(targets.log_probs[..., -1].double().exp(), 1 - largest.sum(-1), **near)
    assert torch.equal(targets.windows, tokens)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_token_that_follows_is_a_share_of_the_target(share, monkeypatch):
    """Towards the mixture the loss has the gradient of divergence and cross-entropy in their shares (float64)."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    monkeypatch.setattr(distillation, "TOP_K", 5)
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 96 * 2 * 5)  # five tokens of two windows
    model, tokens = LanguageModel(tiny_model("llama_tied")), tiny_tokens(3)
    own, mixed = (dense_targets(model, tokens, label_share=part, batch_size=2) for part in (0.0, share))
    label = tokens[:, 1:, None]
    assert (mixed.ids[:, :-1] == label).sum(-1).eq(1).all()
    assert (own.ids[:, :-1] == label).any(-1).float().mean() < 0.5  # most are put in for the fifth
    torch.testing.assert_close(mixed.log_probs.exp().sum(-1), torch.ones(tokens.shape))
    assert torch.equal(mixed.ids[:, -1], own.ids[:, -1])
    torch.testing.assert_close(mixed.log_probs[:, -1], own.log_probs[:, -1])

    ids, wanted = mixed.ids[:, :-1].long(), mixed.log_probs[:, :-1]
    with torch.no_grad():
        dense = grouped(model.model(tokens).logits[:, :-1].double().softmax(-1), ids)
    logits = 3 * torch.randn(*ids.shape[:2], 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reference(logits: torch.Tensor) -> torch.Tensor:
        divergence = (dense * (dense / grouped(logits.softmax(-1), ids)).log()).sum()
        return (1 - share) * divergence + share * F.cross_entropy(logits.mT, label[..., 0], reduction="sum")

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return Divergence.apply(*(kind.flatten(0, 1) for kind in (logits, ids, wanted)))

    torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits), rtol=1e-4, atol=1e-5)


def test_each_window_has_its_own_share(monkeypatch):
    """In one batch, as where each is alone: of a window without labels the likeliest tokens stay told apart."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    monkeypatch.setattr(distillation, "TOP_K", 5)
    model, tokens = LanguageModel(tiny_model("llama_tied")), tiny_tokens(3)
    shares = (0.5, 0.0, 0.75)
    together = dense_targets(model, tokens, torch.tensor(shares), batch_size=2)
    for place, share in enumerate(shares):
        alone = dense_targets(model, tokens[place : place + 1], share)
        assert torch.equal(together.ids[place], alone.ids[0])
        torch.testing.assert_close(together.log_probs[place].exp(), alone.log_probs[0].exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beside", [False, True])
def test_labels_alone_are_cross_entropy_and_take_no_pass(beside, monkeypatch):
    """Of all windows, or of some of a batch: the loss and its gradient, in float64, of every token but the last."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    monkeypatch.setattr(distillation, "TOP_K", 5)
    passed, last_hidden_states = [], distillation.last_hidden_states
    monkeypatch.setattr(
        distillation, "last_hidden_states",
        lambda model, windows, size: passed.append(windows) or last_hidden_states(model, windows, size),
    )  # fmt: skip
    model, tokens = LanguageModel(tiny_model("llama_tied")), tiny_tokens(3)
    shares = torch.tensor([1.0, 0.0, 1.0]) if beside else 1.0
    targets = dense_targets(model, tokens, shares, batch_size=2)
    assert [windows.tolist() for windows in passed] == ([[tokens[1].tolist()]] if beside else [])
    assert targets.ids.shape[-1] == (5 if beside else 1)
    logits = 3 * torch.randn(2, *tokens.shape[1:], 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reference(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].mT, tokens[::2, 1:], reduction="sum")

    def ours(logits: torch.Tensor) -> torch.Tensor:
        ids, wanted = targets.ids[::2].long(), targets.log_probs[::2]
        return Divergence.apply(*(kind.flatten(0, 1) for kind in (logits, ids, wanted)))

    torch.testing.assert_close(ours(logits).double(), reference(logits), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits), rtol=1e-4, atol=1e-6)


def grouped(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The probabilities of `ids` and, last, of all others."""
    told_apart = probabilities.gather(-1, ids)
    return torch.cat([told_apart, 1 - told_apart.sum(-1, keepdim=True)], dim=-1)


def gradient(loss, at: torch.Tensor) -> torch.Tensor:
    at = at.clone().requires_grad_()
    loss(at).backward()
    return at.grad


def test_training_is_that_of_a_reference(monkeypatch):
    """A toy whose whole vocabulary but one is kept: the exact divergence, in float64 by autograd and torch's Adam."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    monkeypatch.setattr(distillation, "TOP_K", 95)
    hf, tokens = Toy([Block(), Block()]), tiny_tokens(7, 10)
    hf.get_output_embeddings = lambda: hf.lm_head
    model, recipe = LanguageModel(hf), distillation.RECIPE
    targets = dense_targets(model, tokens, batch_size=3)
    with torch.no_grad():
        dense = hf.double()(tokens).logits.log_softmax(-1)
    pruned(LanguageModel(hf.float()))
    reference = copy.deepcopy(hf).double()
    means = distil(model, targets, batch_size=3)

    weights = [layer.inner[index].weight.requires_grad_(True) for layer in reference.model.layers for index in (0, 2)]
    kept = [weight != 0 for weight in weights]
    peaks = [
        recipe.learning_rate * weight[mask].square().mean().sqrt().item()
        for weight, mask in zip(weights, kept, strict=True)
    ]
    adam = torch.optim.Adam([{"params": [weight]} for weight in weights], eps=1e-8)
    total = 0.0
    for place, step in enumerate(torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()):
        part = slice(2 * step, 2 * step + 2)
        adam.zero_grad()
        own = reference(tokens[part]).logits.log_softmax(-1)
        loss = (dense[part].exp() * (dense[part] - own)).sum()
        loss.backward()
        total += float(loss.detach())
        for weight, mask in zip(weights, kept, strict=True):
            weight.grad *= mask
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = peak * recipe.lr_factor(place, 4)
        adam.step()
    assert means == [pytest.approx(total / tokens.numel(), rel=1e-4)]
    found = [layer.inner[index].weight for layer in hf.model.layers for index in (0, 2)]
    for one, other in zip(found, weights, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "mixtral", "zamba", "rwkv"])
def test_the_model_comes_closer_and_the_rest_stays(architecture, dtype):
    if architecture in ("zamba", "rwkv") and dtype != torch.float32:
        pytest.skip("once")
    model, tokens = LanguageModel(tiny_model(architecture).to(dtype)), tiny_tokens(16)
    targets = dense_targets(model, tokens, batch_size=4)
    pruned(model, group=4)
    zeros = {matrix: matrix.weight == 0 for matrix in model.matrices}
    trained = {id(matrix.stored) for matrix in model.matrices}
    others = {name: p.clone() for name, p in model.model.named_parameters() if id(p) not in trained}

    def divergence() -> float:
        with torch.no_grad():
            logits = model.model(tokens).logits
        own = log_probabilities(logits, targets.ids.long())
        return float((targets.log_probs.exp() * (targets.log_probs - own)).sum() / tokens.numel())

    before = divergence()
    distil(model, targets, batch_size=2)
    assert divergence() < 0.96 * before
    assert all(torch.equal(matrix.weight == 0, mask) for matrix, mask in zeros.items())
    now = dict(model.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in others.items())
    assert {p.dtype for p in model.model.parameters()} == {dtype}
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def test_a_run_recovers_on_the_models_own_text_beside_a_corpus(tmp_path, monkeypatch):
    """The corpus's windows with labels, then the model's own without."""
    seen = []

    def watched(model, windows, label_share, **more):
        seen.append((windows, label_share))
        return dense_targets(model, windows, label_share, **more)

    monkeypatch.setattr(sampling, "AT_ONCE", 96)
    monkeypatch.setattr(plan, "dense_targets", watched)
    tiny_model("llama_tied").save_pretrained(tmp_path / "model")
    options = {"recover": "model", "recover_nsamples": 6, "distill": 0.75}
    beside, _ = run(tmp_path, "beside", **options, recover_self=3)
    plain, _ = run(tmp_path, "plain", **options)
    assert beside["perplexity"]["pruned"] != plain["perplexity"]["pruned"]
    assert "sample" in beside["seconds"]
    assert "sample" not in plain["seconds"]
    (windows, shares), (corpus, of_corpus) = seen
    assert torch.equal(windows[:6], corpus)
    assert (shares.tolist(), of_corpus.tolist()) == ([0.25] * 6 + [0.0] * 3, [0.25] * 6)


def test_a_run_recovers_on_the_models_own_text(tmp_path, monkeypatch):
    """The whole command in memory: its stages, its zeros, saved weights that are those it measured."""
    monkeypatch.setattr(sampling, "AT_ONCE", 96)
    tiny_model("llama_tied").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {
        "nsamples": 4, "calib_data": "self", "recover": ("model", "block"), "recover_nsamples": 6, "dtype": "float32",
        "sparsity_ratio": None, "sparsity_type": "2:4",
    }  # fmt: skip
    record, saved = run(tmp_path, "recovered", **options)
    assert {"sample", "targets", "recover", "prune"} <= record["seconds"].keys()
    assert record["config"]["recover"] == ["block", "model"]
    assert all(layer["sparsity"] == 0.5 for layer in record["layers"])
    plain, _ = run(tmp_path, "plain", **{**options, "recover": "none", "recover_nsamples": None})
    labelled, _ = run(tmp_path, "labelled", **options, distill=0.5)
    assert len({each["perplexity"]["pruned"] for each in (record, plain, labelled)}) == 3
    model = load_model(find_source(str(saved)), "cpu", "float32")
    for matrix in model.matrices:
        assert ((matrix.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
        assert torch.equal(matrix.weight, matrix.weight.bfloat16().float())
