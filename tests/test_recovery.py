"""Block recovery: what it reaches, and what it leaves alone."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, precision, recovery
from lib.sequential import prune_model, walk


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(recovery, "RATE", 3e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_come_closer_and_zeros_stay(architecture):
    model, tokens = LanguageModel(tiny_model(architecture)), tiny_tokens(8)
    for step in walk(model, tokens, "diagonal", batch_size=2, dense=True):
        for matrix in step.matrices:
            matrix.write(PRUNERS["magnitude"].prune(matrix.weight, None, 0.5, Pattern()))
        zeros = {matrix: matrix.weight == 0 for matrix in step.matrices}
        others = {n: p.clone() for n, p in model.model.named_parameters() if n not in names_of(model, step.matrices)}

        def error(step=step) -> float:
            with torch.no_grad():
                outputs = [step.stream.output(step.block, batch) for batch in range(len(step.stream))]
            return sum(
                float((found - wanted).square().sum()) for found, wanted in zip(outputs, step.dense.hidden, strict=True)
            )

        before = error()
        recovery.recover(step.matrices, lambda b, step=step: step.stream.output(step.block, b), step.dense.hidden)
        assert error() < 0.97 * before
        assert all(torch.equal(matrix.weight == 0, mask) for matrix, mask in zeros.items())
        now = dict(model.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in others.items())
        assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def names_of(model: LanguageModel, matrices: list) -> set[str]:
    owned = {id(getattr(m.module, m.parameter)) for m in matrices}
    return {name for name, parameter in model.model.named_parameters() if id(parameter) in owned}


def test_one_step_of_one_weight_by_hand(monkeypatch):
    """y = w x towards 2 x from w = 1: Adam's first step is its rate, and a removed weight takes none."""
    monkeypatch.setattr(recovery, "EPOCHS", 1)
    monkeypatch.setattr(precision, "fast_type", lambda _device: torch.float32)
    model = LanguageModel(tiny_model("llama"))
    matrix = model.matrices[0]
    matrix.weight.zero_()
    matrix.weight[0, 0] = 1.0
    x = torch.ones(1, 1, matrix.shape[1])
    recovery.recover([matrix], lambda _batch: x @ matrix.module.weight.T, [2 * torch.ones(1, 1, matrix.shape[0])])
    assert float(matrix.weight[0, 0]) == pytest.approx(1 + recovery.RATE, rel=1e-4)
    assert int(matrix.weight.count_nonzero()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype):
    model = LanguageModel(tiny_model("llama").to(dtype))
    plain = LanguageModel(copy.deepcopy(model.model))
    targets = {m.name: 0.5 for m in model.matrices}
    prune_model(plain, PRUNERS["wanda"], targets, Pattern(), tiny_tokens(), batch_size=2)
    prune_model(model, PRUNERS["wanda"], targets, Pattern(), tiny_tokens(), batch_size=2, recovery=True)
    assert {p.dtype for p in model.model.parameters()} == {dtype}
    assert all(abs(float((m.weight == 0).float().mean()) - 0.5) < 0.02 for m in model.matrices)
    assert any(not torch.equal(a.weight, b.weight) for a, b in zip(model.matrices, plain.matrices, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_small_outputs_in_float16(architecture):
    """Relative to a small output the error is large, and its gradients are beyond what float16 holds."""
    hf, small = tiny_model(architecture).to(torch.float16), 1e-3
    hf.get_input_embeddings().weight.data.mul_(small)
    model = LanguageModel(hf)
    for matrix in model.matrices:
        if matrix.name.endswith(("o_proj", "down_proj", "c_proj", "out_proj", "fc2")):
            matrix.write(small * matrix.weight)
    targets = {m.name: 0.5 for m in model.matrices}
    prune_model(model, PRUNERS["wanda"], targets, Pattern(), tiny_tokens(), batch_size=6, recovery=True)
    assert {p.dtype for p in model.model.parameters()} == {torch.float16}
    assert all(m.weight.isfinite().all() for m in model.matrices)
