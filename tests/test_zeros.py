"""Zeros that are there already, and inputs that are always zero: targets are met, and nothing comes back."""

import pytest
import torch
from test_pruners import correlated_inputs, stats_of
from tiny import tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, RunError, prune_model, sequential
from lib.masks import lowest_of_groups, lowest_of_matrix, lowest_of_rows
from lib.pruners import Pruner
from lib.pruners.sparsegpt import counts_of_groups
from lib.stats import InputStats

# Every pruner, the variant, and what goes on around a pruner.
WAYS = {
    **{name: (PRUNERS[name], {}) for name in PRUNERS},
    "variant": (PRUNERS["wanda"].variant, {}),
    **{f"{name} asymmetry": (PRUNERS[name], {"asymmetry": 0.5}) for name in ("sparsegpt", "alps")},
    **{f"{name} fisher": (PRUNERS[name], {"fisher": True}) for name in ("sparsegpt", "alps")},
    **{f"{name} recover": (PRUNERS[name], {"recovery": True}) for name in ("magnitude", "wanda", "alps")},
    "all": (PRUNERS["alps"], {"asymmetry": 0.5, "fisher": True, "recovery": True}),
}
UNSTRUCTURED, TWO_OF_FOUR = Pattern(), Pattern(4)
PATTERNS = {"unstructured": UNSTRUCTURED, "2:4": TWO_OF_FOUR}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]
EVERY = [(way, pattern) for way in WAYS for pattern in PATTERNS if (way, pattern) != ("variant", "2:4")]


def pruned(model: LanguageModel, way: str, sparsity: float, pattern: Pattern = UNSTRUCTURED) -> list[dict]:
    """Prune every matrix; the events."""
    pruner, options = WAYS[way]
    options, events = dict(options), []
    if options.pop("fisher", False):
        generator = torch.Generator().manual_seed(2)
        options["row_weights"] = {m.name: torch.rand(m.shape[0], generator=generator) + 0.1 for m in model.matrices}
    targets = {matrix.name: sparsity for matrix in model.matrices}
    prune_model(model, pruner, targets, pattern, tiny_tokens(), batch_size=3, events=events, **options)
    return events


def zeros_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.weight == 0 for matrix in model.matrices}


def with_zeros(kind: str) -> LanguageModel:
    """A model of whose weights a third are zero: as magnitude left it, in whole rows, or in whole columns."""
    model = LanguageModel(tiny_model("llama"))
    for matrix in model.matrices:
        if kind == "scattered":
            matrix.write(PRUNERS["magnitude"].prune(matrix.weight, None, 1 / 3, UNSTRUCTURED))
        else:
            (matrix.weight if kind == "rows" else matrix.weight.T)[::3] = 0
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["scattered", "rows", "columns"])
@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_and_count(way, kind, device):
    model = with_zeros(kind)
    model.model.to(device)
    before = zeros_of(model)
    assert pruned(model, way, 0.6) == []
    for matrix in model.matrices:
        found = matrix.weight == 0
        assert bool(found[before[matrix.name]].all()), matrix.name
        assert int(found.sum()) == round(0.6 * matrix.size), matrix.name


@pytest.mark.parametrize("way", [way for way, pattern in EVERY if pattern == "2:4"])
def test_groups_keep_the_zeros_they_have(way):
    model = with_zeros("scattered")
    before = zeros_of(model)
    events = pruned(model, way, 0.5, TWO_OF_FOUR)
    said = {event["matrix"]: event["message"] for event in events}
    for matrix in model.matrices:
        found, had = matrix.weight == 0, before[matrix.name]
        assert bool(found[had].all())
        expected = had.reshape(-1, 4).sum(1).clamp(min=2)
        assert found.reshape(-1, 4).sum(1).tolist() == expected.tolist()
        share = float(expected.sum()) / matrix.size
        assert f"{share:.4f} sparse, more than its target of 0.5000" in said[matrix.name]


@pytest.mark.parametrize(("way", "pattern"), EVERY)
def test_pruning_to_less_than_there_is_removes_nothing_and_says_so(way, pattern):
    """With as many as three zeros in each group of four, no pattern asks for more."""
    model = LanguageModel(tiny_model("llama"))
    for matrix in model.matrices:
        matrix.write(PRUNERS["magnitude"].prune(matrix.weight, None, 0.75, TWO_OF_FOUR))
    before = zeros_of(model)
    events = pruned(model, way, 0.5, PATTERNS[pattern])
    assert all(torch.equal(found, before[name]) for name, found in zeros_of(model).items())
    assert {event["matrix"] for event in events} == set(before)
    assert {event["message"] for event in events} == {
        "zeros that are there already make it 0.7500 sparse, more than its target of 0.5000"
    }


def test_a_matrix_that_is_left_alone_still_says_that_it_has_zeros():
    model, events = with_zeros("rows"), []
    targets = {matrix.name: 0.5 * matrix.block for matrix in model.matrices}
    prune_model(model, PRUNERS["magnitude"], targets | {model.matrices[-1].name: 0.9}, UNSTRUCTURED, events=events)
    assert [event["matrix"] for event in events] == [matrix.name for matrix in model.matrices_of(0)]


def dead_model() -> tuple[LanguageModel, str]:
    """A model in which one matrix, whose name is given, reads nothing but zeros."""
    model = LanguageModel(tiny_model("llama"))
    model.blocks[1].mlp.up_proj.weight.data.zero_()
    return model, "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "pattern"), EVERY)
def test_an_input_that_is_always_zero_is_pruned_by_magnitude(way, pattern, device):
    model, name = dead_model()
    model.model.to(device)
    weight = next(matrix.weight.clone() for matrix in model.matrices if matrix.name == name)
    events = pruned(model, way, 0.5, PATTERNS[pattern])
    found = next(matrix.weight for matrix in model.matrices if matrix.name == name)
    assert torch.equal(found, PRUNERS["magnitude"].prune(weight, None, 0.5, PATTERNS[pattern]))
    noted = [event["message"] for event in events if event["matrix"] == name]
    assert noted == ([] if way.startswith("magnitude") else ["its input is always zero; pruned by magnitude"])
    for matrix in model.matrices:
        if not matrix.name.endswith("1.mlp.up_proj"):
            assert int((matrix.weight == 0).sum()) == matrix.size // 2, matrix.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.25, 0.75])
@pytest.mark.parametrize(("way", "pattern"), EVERY)
def test_inputs_of_which_some_are_always_zero(way, pattern, share, device):
    """Every matrix meets its target, also where more of its inputs are dead than weights are to go."""
    model = LanguageModel(tiny_model("llama").to(device))
    for layer in model.blocks:
        for rows in (layer.mlp.up_proj.weight, layer.self_attn.v_proj.weight):
            rows.data[: int(share * len(rows))] = 0
        layer.input_layernorm.weight.data[: int(share * 32)] = 0
    before = zeros_of(model)
    pruned(model, way, 0.5, PATTERNS[pattern])
    for matrix in model.matrices:
        found, had = matrix.weight == 0, before[matrix.name]
        assert matrix.weight.isfinite().all()
        assert bool(found[had].all())
        if PATTERNS[pattern].group is None:
            assert int(found.sum()) == max(matrix.size // 2, int(had.sum())), matrix.name
        else:
            assert found.reshape(-1, 4).sum(1).tolist() == had.reshape(-1, 4).sum(1).clamp(min=2).tolist()


@pytest.mark.parametrize("dead", [[0, 1], [38, 39], list(range(0, 40, 3)), list(range(30))])
@pytest.mark.parametrize("name", ["wanda", "ria", "sparsegpt", "variant"])
def test_weights_of_dead_inputs_go_first(name, dead):
    weight, x = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)), correlated_inputs(300, 40)
    x[:, dead] = 0
    pruner = WAYS[name][0]
    found = pruner.prune(weight, stats_of(x, pruner.needs), 0.5, UNSTRUCTURED) == 0
    assert int(found.sum()) == weight.numel() // 2
    if len(dead) <= 20:
        assert bool(found[:, dead].all())
    else:
        alive = [column for column in range(40) if column not in dead]
        assert not found[:, alive].any()


def test_sparsegpt_removes_dead_inputs_beyond_their_groups_share():
    """All of the first group's inputs are dead: its weights go, fewer of the second's, and those stand as they were."""
    weight, x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)), correlated_inputs(600, 256)
    x[:, :128] = 0
    found = PRUNERS["sparsegpt"].prune(weight, stats_of(x), 0.5, UNSTRUCTURED)
    assert not found[:, :128].any()
    torch.testing.assert_close(found[:, 128:], weight[:, 128:])
    less = PRUNERS["sparsegpt"].prune(weight, stats_of(x), 0.25, UNSTRUCTURED)
    removed = less == 0
    assert int(removed.sum()) == 0.25 * weight.numel()
    assert weight[:, :128][removed[:, :128]].abs().max() < weight[:, :128][~removed[:, :128]].abs().min()


def test_what_stays_makes_up_for_the_zeros():
    """Values that stand where zeros have to stay (the aim's) are removed as any others are: against float64."""
    weight, x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)), correlated_inputs(500, 64)
    zeroed = torch.rand(12, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    pattern, sparsity = Pattern(zeroed=zeroed), float(zeroed.float().mean())
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64)

    expected = weight.double()  # optimal brain surgeon from left to right
    for j in range(64):
        inverse = torch.linalg.inv(hessian[j:, j:])
        expected[:, j:] -= torch.outer(torch.where(zeroed[:, j], expected[:, j], 0) / inverse[0, 0], inverse[0])
        expected[zeroed[:, j], j] = 0
    found = PRUNERS["sparsegpt"].prune(weight, stats_of(x), sparsity, pattern)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)

    found = PRUNERS["alps"].prune(weight, stats_of(x), sparsity, pattern)  # least squares on what stays
    best = torch.zeros_like(expected)
    for row, kept in enumerate(~zeroed):
        target = hessian[kept] @ weight[row].double()
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], target)

    def error(other: torch.Tensor) -> float:
        gap = other.double() - weight.double()
        return float((gap @ hessian * gap).sum())

    assert bool((found[zeroed] == 0).all())
    assert error(found) < 1.02 * error(best) < 0.8 * error(expected) < error(weight.masked_fill(zeroed, 0))


def test_counts_of_groups_by_hand():
    # 4 groups of 2 columns and 5 rows at a half: 5 each.
    assert counts_of_groups(8, 5, 2, 0.5, None) == [5, 5, 5, 5]
    zeroed = torch.zeros(8, 5, dtype=torch.bool)
    zeroed[4:6] = True  # the third group has 10: the fourth has to make up for what the first two still took
    assert counts_of_groups(8, 5, 2, 0.5, zeroed) == [5, 5, 10, 0]
    zeroed[6:8] = True  # the last two hold all that may go
    assert counts_of_groups(8, 5, 2, 0.5, zeroed) == [0, 0, 10, 10]
    zeroed[:2] = True
    assert counts_of_groups(8, 5, 2, 0.5, zeroed) == [10, 0, 10, 10]


def test_rows_lose_alike_beyond_their_zeros_by_hand():
    scores = torch.tensor([[5.0, 5, 5, 5], [1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    zeroed = torch.zeros(3, 4, dtype=torch.bool)
    zeroed[0] = True
    # Of 7, the first row has 4; one each is left for the others, and the third goes where the next score is lowest.
    assert lowest_of_rows(scores, 7 / 12, zeroed).sum(1).tolist() == [4, 2, 1]
    assert lowest_of_rows(scores + torch.tensor([[0.0], [1], [0]]), 7 / 12, zeroed).sum(1).tolist() == [4, 1, 2]
    assert torch.equal(lowest_of_rows(scores, 0.25, zeroed), zeroed)


def test_gone_weights_come_first_whatever_their_scores():
    generator = torch.Generator().manual_seed(0)
    for select in (lowest_of_matrix, lowest_of_rows):
        for share in (0.1, 0.5, 0.9):
            scores = torch.rand(13, 16, generator=generator)
            zeroed = torch.rand(13, 16, generator=generator) < share
            zeroed[2], zeroed[3] = True, False
            for sparsity in (0.0, 0.3, 0.6, 0.95, 1.0):
                mask = select(scores, sparsity, zeroed)
                assert bool(mask[zeroed].all())
                assert int(mask.sum()) == max(round(sparsity * 208), int(zeroed.sum()))
                nothing = torch.zeros_like(zeroed)
                assert torch.equal(select(scores, sparsity, nothing), select(scores, sparsity))
    mask = lowest_of_groups(
        torch.tensor([[1.0, 2, 3, 4, 4, 3, 2, 1]]), 2, 4, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]]) > 0
    )
    assert mask.tolist() == [[True, False, False, True, True, True, True, False]]


@pytest.mark.parametrize("name", PRUNERS)
def test_a_direct_call_with_a_matrix_of_zeros_ends(name):
    stats = stats_of(correlated_inputs(80, 12), "gram")
    assert not PRUNERS[name].prune(torch.zeros(5, 12), stats, 0.5, UNSTRUCTURED).any()


# ---------------------------------------------------------------- linear algebra that fails


@pytest.mark.parametrize(
    ("name", "asymmetry", "function"),
    [("sparsegpt", 0.0, "cholesky"), ("alps", 0.0, "eigh"), ("alps", 0.5, "cholesky")],
)
@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_factorisation_that_fails_is_tried_again(monkeypatch, name, asymmetry, function, failures):
    model, calls, events = LanguageModel(tiny_model("llama")), [], []
    real = getattr(torch.linalg, function)

    def failing(*args):
        calls.append(args)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("linalg: the algorithm failed to converge\nand more")
        return real(*args)

    monkeypatch.setattr(torch.linalg, function, failing)
    targets, first = {matrix.name: 0.5 for matrix in model.matrices}, model.matrices[0].name
    arguments = (model, PRUNERS[name], targets, UNSTRUCTURED, tiny_tokens())
    if failures > 3:
        with pytest.raises(RunError, match=rf"^{first}: .* fails even with damping 10 .*--nsamples") as error:
            prune_model(*arguments, events=events, asymmetry=asymmetry)
        assert "\n" not in str(error.value)
    else:
        prune_model(*arguments, events=events, asymmetry=asymmetry)
        assert [event["matrix"] for event in events] == [first] * failures
        assert [float(event["message"].split()[-5]) for event in events] == pytest.approx([0.01, 0.1, 1.0][:failures])


def test_a_pruner_of_ones_own_that_fails_ends_in_one_line():
    def prune(weight, stats, sparsity, pattern):
        return torch.linalg.cholesky(-torch.eye(3))

    model = LanguageModel(tiny_model("llama"))
    targets = {matrix.name: 0.5 for matrix in model.matrices}
    with pytest.raises(RunError, match=rf"^{model.matrices[0].name}: linalg.*--nsamples"):
        prune_model(model, Pruner(prune, "nothing"), targets, UNSTRUCTURED)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "--dtype float32"), (torch.float32, "prune with wanda")])
def test_the_advice_for_what_is_not_finite_fits_the_type(dtype, advice):
    model = LanguageModel(tiny_model("llama").to(dtype))
    pruner = Pruner(lambda weight, *_: weight * torch.nan, "nothing")
    with pytest.raises(RunError, match=f"after pruning it holds NaN or infinity; .*{advice}"):
        prune_model(model, pruner, {m.name: 0.5 for m in model.matrices}, UNSTRUCTURED)


def test_tiny_inputs_are_no_zeros():
    """Squares near the end of float32's range still tell the inputs apart."""
    weight, x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1)), correlated_inputs(200, 32)
    for name in ("wanda", "ria", "sparsegpt", "alps"):
        expected = PRUNERS[name].prune(weight, stats_of(x, "gram"), 0.5, UNSTRUCTURED)
        found = PRUNERS[name].prune(weight, stats_of(x * 1e-16, "gram"), 0.5, UNSTRUCTURED)
        assert float(((found == 0) == (expected == 0)).float().mean()) > 0.95, name


def test_matrices_that_share_statistics_share_the_note_of_zeros():
    stats = InputStats("gram")
    stats.add(torch.zeros(10, 32))
    stats.finish()
    model, events = LanguageModel(tiny_model("llama")), []
    for matrix in model.matrices[:3]:
        sequential._prune_matrix(matrix, PRUNERS["alps"], stats, 0.5, UNSTRUCTURED, 0.5, None, events)
    assert [event["matrix"] for event in events] == [matrix.name for matrix in model.matrices[:3]]
