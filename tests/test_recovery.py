"""Block recovery: the optimisation that it is, what it reaches, and what it leaves alone."""

import copy
import dataclasses

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model, tiny_tokens
from toy import WIDTH, Block, Toy

from lib import PRUNERS, LanguageModel, Pattern, precision, ranks, recovery
from lib.activations import Activations
from lib.sequential import prune_model, walk
from lib.training import Recipe, train

FAST = dataclasses.replace(recovery.RECIPE, rate=3e-3)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(recovery, "RECIPE", FAST)


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
        recovery.recover(step.matrices, lambda b, step=step: step.stream.output(step.block, b), step.dense.hidden, 8)
        assert error() < 0.97 * before
        assert all(torch.equal(matrix.weight == 0, mask) for matrix, mask in zeros.items())
        now = dict(model.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in others.items())
        assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def names_of(model: LanguageModel, matrices: list) -> set[str]:
    owned = {id(getattr(m.module, m.parameter)) for m in matrices}
    return {name for name, parameter in model.model.named_parameters() if id(parameter) in owned}
