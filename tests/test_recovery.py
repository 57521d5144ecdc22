"""Block recovery: the optimisation that it is, what it reaches, and what it leaves alone."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model, tiny_tokens
from toy import Block, Toy

from lib import PRUNERS, LanguageModel, Pattern, precision, ranks, recovery, training
from lib.activations import Activations
from lib.sequential import prune_model, walk
from lib.training import Recipe

FAST = Recipe(epochs=4, windows=4, learning_rate=0.1, min_lr_ratio=0.2)


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
                outputs = [step.blockwise.output(step.block, batch) for batch in range(len(step.blockwise))]
            return sum(
                float((found - wanted).square().sum()) for found, wanted in zip(outputs, step.dense.hidden, strict=True)
            )

        before = error()
        recovery.recover(step.matrices, lambda b, step=step: step.blockwise.output(step.block, b), step.dense.hidden, 8)
        assert error() < 0.97 * before
        assert all(torch.equal(matrix.weight == 0, mask) for matrix, mask in zeros.items())
        now = dict(model.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in others.items())
        assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def names_of(model: LanguageModel, matrices: list) -> set[str]:
    owned = {id(getattr(m.module, m.parameter)) for m in matrices}
    return {name for name, parameter in model.model.named_parameters() if id(parameter) in owned}


def adam_by_hand(weight, gradient_of, rates, kept):
    """Adam as its paper has it, in float64, on the weights that are kept."""
    weight, mean, square = weight.double(), 0.0, 0.0
    for step, rate in enumerate(rates, start=1):
        gradient = gradient_of(step - 1, weight) * kept
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weight = weight - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


def test_a_linear_map_is_trained_as_by_hand(monkeypatch):
    """y = W x towards V x for 6 windows in steps of 4 and 2, whose order is the generator's; two epochs."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    monkeypatch.setattr(recovery, "RECIPE", Recipe(epochs=2, windows=4, learning_rate=0.4, min_lr_ratio=0.2))
    model = LanguageModel(tiny_model("llama"))
    matrix, generator = model.matrices[0], torch.Generator().manual_seed(3)
    matrix.write(PRUNERS["magnitude"].prune(matrix.weight, None, 0.5, Pattern()))
    weight, kept = matrix.weight.clone(), matrix.weight != 0
    x = torch.randn(6, 5, matrix.shape[1], generator=generator)
    y = x @ torch.randn(matrix.shape, generator=generator).T
    order = torch.Generator().manual_seed(0)
    steps = [step for _ in range(2) for step in torch.randperm(2, generator=order).tolist()]
    parts = [slice(0, 4), slice(4, 6)]
    errors = []

    def gradient(step: int, now: torch.Tensor) -> torch.Tensor:
        part = parts[steps[step]]
        inputs, residual = x[part].double().flatten(0, 1), (x[part].double() @ now.T - y[part].double()).flatten(0, 1)
        errors.append(float(residual.square().sum()))
        return 2 * residual.T @ inputs / float(y.square().mean())

    peak = 0.4 * weight[kept].double().square().mean().sqrt().item()  # relative to the surviving weights
    rates = [peak * (0.2 + 0.8 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) / 2) for k in range(4)]
    expected = adam_by_hand(weight, gradient, rates, kept)
    wanted = Activations(model.device, 3, None)
    for batch in range(3):
        wanted.put(batch, y[2 * batch : 2 * batch + 2])
    first, last = recovery.recover([matrix], lambda b: x[2 * b : 2 * b + 2] @ matrix.module.weight.T, wanted, 6)
    torch.testing.assert_close(matrix.weight.double(), expected, rtol=1e-5, atol=1e-6)
    energy = float(y.square().sum())
    assert [first, last] == pytest.approx([sum(errors[:2]) / energy, sum(errors[2:]) / energy], rel=1e-4)
    assert torch.equal(matrix.weight != 0, kept)


def test_a_block_is_trained_towards_the_dense_model(monkeypatch):
    """Two blocks of a toy by autograd in float64: the second starts from what the first one's training has left."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    recipe = Recipe(epochs=3, windows=4, learning_rate=0.1, min_lr_ratio=0.5)
    monkeypatch.setattr(recovery, "RECIPE", recipe)
    hf, tokens = Toy([Block(), Block()]), tiny_tokens(8, 10)
    reference, model = copy.deepcopy(hf).double(), LanguageModel(hf)
    targets = {m.name: 0.5 for m in model.matrices}
    prune_model(model, PRUNERS["magnitude"], targets, Pattern(), tokens, batch_size=3, recovery=True)
    dense = student = reference.model.embed(tokens).detach()
    for block in reference.model.layers:
        with torch.no_grad():
            dense = block(dense)
        weights = [block.inner[0].weight, block.inner[2].weight]
        with torch.no_grad():
            for weight in weights:
                smallest = weight.abs().flatten().argsort()[: weight.numel() // 2]
                weight.view(-1)[smallest] = 0
        kept = [weight != 0 for weight in weights]
        peaks = [recipe.learning_rate * weight[weight != 0].square().mean().sqrt().item() for weight in weights]
        adam = torch.optim.Adam([{"params": [weight]} for weight in weights], eps=1e-10)
        order = torch.Generator().manual_seed(0)
        for epoch in range(3):
            for place, step in enumerate(torch.randperm(2, generator=order).tolist()):
                part = slice(4 * step, 4 * step + 4)
                adam.zero_grad()
                (block(student[part]) - dense[part]).square().sum().backward()
                for weight, mask in zip(weights, kept, strict=True):
                    weight.grad *= mask
                for group, peak in zip(adam.param_groups, peaks, strict=True):
                    group["lr"] = peak * recipe.lr_factor(2 * epoch + place, 6)
                adam.step()
        with torch.no_grad():
            student = block(student)
    for found, expected in zip(hf.model.layers, reference.model.layers, strict=True):
        for index in (0, 2):
            torch.testing.assert_close(
                found.inner[index].weight.double(), expected.inner[index].weight, rtol=1e-4, atol=1e-5
            )


def test_rates_rise_and_fall():
    recipe = Recipe(epochs=1, windows=2, learning_rate=1.0, min_lr_ratio=0.1, warmup_steps=8)
    rates = [recipe.lr_factor(step, 32) for step in range(33)]
    assert rates[:8] == [(k + 1) / 8 for k in range(8)]
    assert rates[8] == 1
    assert rates[20] == pytest.approx(0.55)  # half way down
    assert rates[32] == pytest.approx(0.1)
    assert [recipe.lr_factor(step, 8) for step in range(3)] == [0.5, 1, 1]  # of few steps a quarter


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("windows", "counted"), [(24, 0), (23, 0), (48, 16), (41, 9)])
def test_a_step_is_the_same_windows_for_any_number_of_ranks(size, windows, counted, monkeypatch):
    recipe = Recipe(epochs=1, windows=8, learning_rate=1.0, min_lr_ratio=0.1)
    monkeypatch.setattr(ranks, "world_size", lambda: size)
    shares = [len(range(rank, windows, size)) for rank in range(size)]
    monkeypatch.setattr(ranks, "all_gather", lambda _: shares)
    batch, found = recipe.batch(4, counted), {}
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        local = torch.arange(windows)[rank::size].split(batch)
        assert not any(bool((part < counted).any()) and bool((part >= counted).any()) for part in local)
        for step, batches in enumerate(training.batches_of_steps(shares[rank], batch, recipe.step)):
            found.setdefault(step, []).extend(window for b in batches for window in local[b].tolist())
    width = max(8, size)
    assert [sorted(found[step]) for step in sorted(found)] == [
        list(range(begin, min(begin + width, windows))) for begin in range(0, windows, width)
    ]
    assert batch == 1 or size in (1, 2, 4)


def test_statistics_are_of_the_first_windows_and_training_of_all(monkeypatch):
    """Without training, further windows change nothing; what is trained depends on them."""
    tokens, few = tiny_tokens(12), 4
    results = {}
    for name, windows, counted, recipe in (
        ("few", tokens[:few], None, Recipe(1, 8, 0.0, 0.2)), ("all", tokens, few, Recipe(1, 8, 0.0, 0.2)),
        ("few trained", tokens[:few], None, FAST), ("all trained", tokens, few, FAST),
    ):  # fmt: skip
        monkeypatch.setattr(recovery, "RECIPE", recipe)
        model = LanguageModel(tiny_model("llama"))
        prune_model(
            model, PRUNERS["sparsegpt"], {m.name: 0.5 for m in model.matrices}, Pattern(), windows, batch_size=4,
            asymmetry=0.5, recovery=True, stats_windows=counted,
        )  # fmt: skip
        results[name] = [matrix.weight.clone() for matrix in model.matrices]
    same = lambda a, b: all(map(torch.equal, results[a], results[b]))  # noqa: E731
    assert same("few", "all")
    assert not same("few trained", "all trained")


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


def test_groups_of_a_pattern_stay():
    model = LanguageModel(tiny_model("llama"))
    targets = {m.name: 0.5 for m in model.matrices}
    prune_model(model, PRUNERS["sparsegpt"], targets, Pattern(4), tiny_tokens(), batch_size=2, recovery=True)
    for matrix in model.matrices:
        assert ((matrix.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
