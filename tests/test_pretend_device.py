"""The road over CUDA, on pretended GPUs: no device is mixed up, results are the CPU's, and no wait is added unseen."""

import functools

import pytest
import torch
from pretend_device import CaptureError, MixedDevicesError, pretended_gpus
from tiny import ARCHITECTURES, SAMPLE, tiny_model, tiny_tokens

from lib import (
    PRUNERS,
    LanguageModel,
    Pattern,
    RunConfig,
    RunError,
    cli,
    find_source,
    layer_quality,
    perplexity,
    prune_model,
    results,
)
from lib.activations import Store
from lib.distillation import dense_targets, distil
from lib.fisher import row_fisher, row_weights
from lib.graphs import captured
from lib.load import load_model, open_model
from lib.placement import memory_needed
from lib.precision import float32_matmul_precision
from lib.pruners import Pruner, alps
from lib.quality import allocation_scores
from lib.results.run import environment
from lib.sparse import choice
from lib.stopwatch import Stopwatch
from lib.trials import Trials

pytestmark = pytest.mark.usefixtures("exact_gradients", "short_alps")

LAYERS = "n_layer", "num_hidden_layers"
ON_TWO = 0.99  # of a model's bytes, free on each of two GPUs


def layers(architecture: str, count: int) -> dict:
    """The option of the architecture's configuration that gives it so many blocks."""
    return {name: count for name in LAYERS if name in ARCHITECTURES[architecture][1]}


@pytest.fixture
def short_alps(monkeypatch):
    """Less to wait for, and less for rounding to add up in."""
    monkeypatch.setattr(alps, "MOST", 4 * alps.EVERY)


# --- the pretended GPUs themselves ---------------------------------------------------------------------------------


def test_devices_do_not_mix():
    with pretended_gpus(2) as gpus:
        one, other = torch.ones(3, device="cuda:1"), torch.ones(3, device="cuda")
        for pair in ((one, other), (one, torch.ones(3))):
            with pytest.raises(MixedDevicesError, match="add of tensors on several devices"):
                torch.add(*pair)
        with pytest.raises(TypeError, match="numpy"):
            one.numpy()
        assert str((one + torch.tensor(2.0)).device) == "cuda:1"  # of a number nobody asks where it lies
        assert one[1:].is_cuda
        assert not one.cpu().is_cuda
        assert str(other.to(one).device) == "cuda:1"
        assert gpus.live[torch.device("cuda", 0)] == 12
    assert str(torch.ones(3).device) == "cpu"


def test_waits_and_moves_are_counted():
    with pretended_gpus() as gpus:
        x = torch.arange(4.0, device="cuda")
        pinned = torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        assert not gpus.waits
        assert (x + pinned).sum().item() == 10
        x[x > 1].cpu()
        assert [what for _, what in gpus.waits] == ["item", "indexing by a mask", "copy to the host"]
        assert gpus.moved == {("outside", "cpu->cuda:0"): 16, ("outside", "cuda:0->cpu"): 8}


def test_gradients_come_back_to_where_they_belong():
    with pretended_gpus(2):
        weight = torch.ones(3, device="cuda:0", requires_grad=True)
        ((2 * weight).to("cuda:1") * torch.full((3,), 5.0, device="cuda:1")).sum().backward()
        assert str(weight.grad.device) == "cuda:0"
        assert weight.grad.tolist() == [10.0] * 3


def test_a_graph_does_nothing_before_it_is_replayed():
    with pretended_gpus():
        x = torch.zeros(3, device="cuda")

        def more() -> None:
            x.add_(x.square() + 1)

        run = captured(more, x.device)
        assert x.tolist() == [1.0] * 3  # of warming up
        run()
        assert x.tolist() == [3.0] * 3
        run()
        assert x.tolist() == [13.0] * 3
        with pytest.raises(CaptureError):
            captured(lambda: x.sum().item(), x.device)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_pays_is_measured_as_it_will_run(compiled, monkeypatch):
    """In a compiled model by CUDA graphs of as many products as there are copies, else call by call."""
    seen, alternating = [], choice._alternating
    monkeypatch.setattr(choice, "_alternating", lambda *both: seen.append([len(c) for c in both]) or alternating(*both))
    monkeypatch.setattr(choice, "MOST_COPIES", 3)
    monkeypatch.setattr(choice, "_pays", {})
    with pretended_gpus():
        weight = torch.ones(8, 16, device="cuda")
        layer = torch.nn.Linear(16, 8, bias=False, device="cuda")
        for _ in range(2):  # and once
            choice.pays(lambda: layer, layer.weight.nbytes, weight, compiled=compiled)
    assert seen == [[1, 1] if compiled else [3, 3]]


# --- results are the CPU's -------------------------------------------------------------------------------------------


def targets(model: LanguageModel, low: float = 0.3, high: float = 0.7) -> dict[str, float]:
    return {m.name: low + (high - low) * i / len(model.matrices) for i, m in enumerate(model.matrices)}


def outcome(model: LanguageModel) -> dict:
    """What is to be the same whatever device the model was pruned on."""
    zeros = {m.name: (m.weight == 0).cpu() for m in model.matrices}
    return {"perplexity": perplexity(model, tiny_tokens(), batch_size=4), "zeros": zeros}


def pruned(model: LanguageModel, _tmp_path, pruner, group: int | None = None, **options) -> dict:
    goals = dict.fromkeys(targets(model), 0.5) if group else targets(model)
    prune_model(model, pruner, goals, Pattern(group), tiny_tokens(), batch_size=4, **options)
    return outcome(model)


def rows(model: LanguageModel, tmp_path) -> dict:
    weights = row_weights(row_fisher(model, tiny_tokens()), 0.5)
    return {"rows": {name: row.tolist() for name, row in weights.items()}} | pruned(
        model, tmp_path, PRUNERS["sparsegpt"], row_weights=weights
    )


def distilled(model: LanguageModel, tmp_path) -> dict:
    dense = dense_targets(model, tiny_tokens(), label_share=0.5, batch_size=2)
    pruned(model, tmp_path, PRUNERS["wanda"])
    distil(model, dense, batch_size=2)
    return outcome(model)


def searched(model: LanguageModel, _tmp_path, store: Store | None = None) -> dict:
    def prune(goals, asymmetry, windows, commit) -> None:
        more = {"asymmetry": asymmetry, "commit": commit, "store": store}
        prune_model(model, PRUNERS["wanda"], goals, Pattern(), windows, batch_size=4, **more)

    parts, found = Trials(model, prune, tiny_tokens(), tiny_tokens(3, seed=2), 4, store).attribute_loss(0.5, 0.0, None)
    return {"parts": parts, "uniform": found["uniform"]}


def saved(model: LanguageModel, tmp_path) -> dict:
    pruned(model, tmp_path, PRUNERS["wanda"])
    results.save_checkpoint(model, tmp_path / "saved")
    return outcome(load_model(find_source(str(tmp_path / "saved")), "cpu", "float32"))


def opened(model: LanguageModel, tmp_path) -> LanguageModel:
    found = open_model(find_source(str(tmp_path / "model")), str(model.device))
    found.load_non_blocks()
    return found


def gradients_streamed(model: LanguageModel, tmp_path) -> dict:
    model, store = opened(model, tmp_path), Store(tmp_path, limit=0)
    fisher = {name: rows.tolist() for name, rows in row_fisher(model, tiny_tokens(), store).items()}
    return {"fisher": fisher, **searched(model, tmp_path, store)}


def streamed(model: LanguageModel, tmp_path, pruner: str, **options) -> dict:
    """The same model out of its files, on the device of the one in memory, with all activations in a file."""
    device, store = str(model.device), Store(tmp_path, limit=0)
    model = opened(model, tmp_path)
    config = results_config(tmp_path, device)
    journal = results.Journal(config, model)
    prune_model(
        model, PRUNERS[pruner], targets(model), Pattern(), tiny_tokens(), batch_size=4, commit=journal.commit,
        store=store, **options,
    )  # fmt: skip
    journal.finish()
    found = perplexity(model, tiny_tokens(), batch_size=4, store=store)
    return outcome(load_model(find_source(config.save_model), "cpu", "float32")) | {"streamed": found}


def results_config(tmp_path, device: str):
    return RunConfig(
        model=str(tmp_path / "model"), prune_method="wanda", sparsity_ratio=0.5, stream=True, seqlen=24, device=device,
        save=str(tmp_path / "out"), save_model=str(tmp_path / "pruned"), cache_dir=str(tmp_path / "cache"),
        calib_data="pydoc", eval_data="pydoc",
    )  # fmt: skip


STEPS = {
    "metrics": lambda model, _: layer_quality(model, "alpha_peak", "entropy", esds={}),
    "perplexity": lambda model, _: {"perplexity": perplexity(model, tiny_tokens(), batch_size=4)},
    "description": lambda model, _: {"digest": model.describe()["digest"], "check": model.check(Pattern(4))},
    "allocations": lambda model, _: allocation_scores(
        model, ["owl", "dlp", "lsa", "lamp"], tiny_tokens(), {"owl_m": 5.0}, "mixed", batch_size=4
    ),
    **{name: functools.partial(pruned, pruner=pruner) for name, pruner in PRUNERS.items()},
    **{f"{name} 2:4": functools.partial(pruned, pruner=pruner, group=4) for name, pruner in PRUNERS.items()},
    "wanda's variant": functools.partial(pruned, pruner=PRUNERS["wanda"].variant),
    "asymmetry": functools.partial(pruned, pruner=PRUNERS["sparsegpt"], asymmetry=0.5),
    "fisher": rows,
    "recovery": functools.partial(pruned, pruner=PRUNERS["wanda"], recovery=True),
    "recovery, asymmetry": functools.partial(pruned, pruner=PRUNERS["sparsegpt"], asymmetry=0.5, recovery=True),
    "distillation": distilled,
    "search": searched,
    "saving": saved,
    "streaming, fisher and search": gradients_streamed,
    "streaming": functools.partial(streamed, pruner="wanda"),
    "streaming, asymmetry and recovery": functools.partial(streamed, pruner="sparsegpt", asymmetry=0.5, recovery=True),
}
# Share of a mask, and of numbers, by which a GPU may differ: ALPS's iterations amplify rounding (docs/gpu.md).
ROUNDING = {"alps": (0.15, 0.05), "alps 2:4": (0.15, 0.05)}
# A CPU's Adam is fused and a GPU's is not; it divides small gradients by their own size, and what rounding makes of
# them grows through SparseGPT's columns: without AVX-512 to 1.4 % of the last matrix's mask, 0.1 % of the perplexity.
ROUNDING |= dict.fromkeys(["recovery, asymmetry", "streaming, asymmetry and recovery"], (0.03, 3e-3))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """architecture -> a folder with a model of two blocks."""

    @functools.cache
    def make(architecture: str):
        folder = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture, **layers(architecture, 2)).save_pretrained(folder / "model")
        return folder

    return make


@pytest.fixture(scope="module")
def expected(folder_of):
    """(architecture, step) -> what it gives on the CPU."""

    @functools.cache
    def on_cpu(architecture: str, step: str):
        folder = folder_of(architecture)
        return STEPS[step](load_model(find_source(str(folder / "model")), "cpu", "float32"), folder)

    return on_cpu


def assert_near(found, wanted, where: str, masks: float, numbers: float) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_near(found[key], value, f"{where} {key}", masks, numbers)
    elif isinstance(wanted, torch.Tensor):
        assert float((found != wanted).float().mean()) <= masks, where
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other, where, masks, numbers)
    else:
        assert found == (pytest.approx(wanted, rel=numbers, abs=1e-6) if isinstance(wanted, float) else wanted), where


# On two GPUs what one matrix's pruning needs is the same, and a streamed model lies on one; the other steps in turn.
ON_GPUS = [(architecture, step, 1) for architecture in SAMPLE for step in STEPS]
ON_TWO_GPUS = [step for step in STEPS if "2:4" not in step and "streaming" not in step]
ON_GPUS += [(SAMPLE[i % len(SAMPLE)], step, 2) for i, step in enumerate(ON_TWO_GPUS)]


@pytest.mark.parametrize(("architecture", "step", "count"), ON_GPUS)
def test_results_are_the_cpus(architecture, step, count, expected, folder_of, tmp_path):
    wanted = expected(architecture, step)
    (tmp_path / "model").symlink_to(folder_of(architecture) / "model")
    size = sum(parameter.nbytes for parameter in tiny_model(architecture, **layers(architecture, 2)).parameters())
    with pretended_gpus(count, **({"free": int(ON_TWO * size)} if count == 2 else {})):
        model = load_model(find_source(str(tmp_path / "model")), "cuda", "float32")
        assert len({str(p.device) for p in model.model.parameters()}) == count
        assert not any(p.device.type == "cpu" for p in model.model.parameters())
        assert_near(STEPS[step](model, tmp_path), wanted, step, *ROUNDING.get(step, (0.002, 1e-3)))


# --- no wait is added unseen -----------------------------------------------------------------------------------------

# How often the host waits for the GPU: once a run, for each block, for each matrix in it, for each batch of windows
# (outside of blocks), and for each batch in each block. ALPS goes through two rounds of its iterations.
WAITS = {
    "magnitude": (0, 1, 2, 0, 0),
    "wanda": (2, 5, 3, 3, 0),
    "ria": (2, 5, 3, 3, 0),
    "sparsegpt": (2, 17, 3, 3, 0),
    "alps": (2, 9, 4, 3, 0),
    "wanda variant": (2, 5, 3, 3, 0),
    "magnitude 2:4": (0, 1, 2, 0, 0),
    "wanda 2:4": (2, 5, 3, 3, 0),
    "ria 2:4": (2, 5, 3, 3, 0),
    "sparsegpt 2:4": (2, 17, 3, 3, 0),
    "alps 2:4": (2, 9, 4, 3, 0),
    "sparsegpt asymmetry": (2, 35, 3, 3, 0),
    "wanda recovery": (2, 10, 4, 3, 1),
    "owl": (2, 4, 1, 3, 0),
    "dlp": (2, 4, 1, 3, 0),
    "lsa": (2, 4, 1, 3, 0),
    "lamp": (0, 0, 1, 0, 0),
    "alpha_peak": (0, 0, 4, 0, 0),
    "digest": (0, 0, 2, 0, 0),
    "perplexity": (0, 0, 0, 4, 0),
    "fisher": (2, 0, 1, 4, 0),
}  # fmt: skip


def waits_of(gpus, scenario: str, architecture: str, blocks: int, batches: int):
    """The waits of a small model with so many blocks and batches, by line and kind."""
    model = LanguageModel(tiny_model(architecture, **layers(architecture, blocks), **NO_PADDING).to("cuda"))
    gpus.start_counting()
    SCENARIOS[scenario](model, tiny_tokens(2 * batches))
    return gpus.waits.copy()


NO_PADDING = {"pad_token_id": None}


def prune_as(name: str, group: int | None = None, **options):
    pruner = PRUNERS["wanda"].variant if name == "wanda variant" else PRUNERS[name]

    def run(model: LanguageModel, tokens: torch.Tensor) -> None:
        goals = dict.fromkeys(targets(model), 0.5)
        prune_model(model, pruner, goals, Pattern(group), tokens, batch_size=2, **options)

    return run


def scores_of(name: str):
    return lambda model, tokens: allocation_scores(model, [name], tokens, {"owl_m": 5.0}, "layer_wise", batch_size=2)


SCENARIOS = {
    **{name: prune_as(name) for name in (*PRUNERS, "wanda variant")},
    **{f"{name} 2:4": prune_as(name, 4) for name in PRUNERS},
    "sparsegpt asymmetry": prune_as("sparsegpt", asymmetry=0.5),
    "wanda recovery": prune_as("wanda", recovery=True),
    **{name: scores_of(name) for name in ("owl", "dlp", "lsa", "lamp")},
    "alpha_peak": lambda model, tokens: layer_quality(model, "alpha_peak"),
    "digest": lambda model, tokens: model.digest,
    "perplexity": lambda model, tokens: perplexity(model, tokens, batch_size=2),
    "fisher": lambda model, tokens: row_weights(row_fisher(model, tokens), 0.5),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_waits(scenario, monkeypatch):
    """A Llama's block has 7 matrices that read 4 tensors, a Phi-3's 4 that read as many."""
    monkeypatch.setattr(alps, "MOST", 2 * alps.EVERY)
    sizes = [("llama", 1, 1), ("llama", 2, 1), ("llama", 1, 2), ("llama", 2, 2), ("phi3", 1, 1)]
    with pretended_gpus() as gpus:
        runs = {size: waits_of(gpus, scenario, *size) for size in sizes}
    counts = {key: waits.total() for key, waits in runs.items()}
    one, blocks, batches, both, fewer = counts.values()
    matrix, in_block = (one - fewer) / 3, both - blocks - batches + one
    block, batch = blocks - one - 7 * matrix - in_block, batches - one - in_block
    found = (one - block - 7 * matrix - batch - in_block, block, matrix, batch, in_block)
    found = tuple(int(count) if count == int(count) else count for count in found)
    lines = "\n".join(f"  {n:4} {where} {what}" for (where, what), n in sorted(runs["llama", 2, 2].items()))
    assert found == WAITS.get(scenario), (
        f'"{scenario}": {found}, (a run, block, matrix, batch, batch in a block) is not in WAITS; where a Llama of two '
        f"blocks waits in a run of two batches:\n{lines}"
    )


# --- what a GPU brings with it ---------------------------------------------------------------------------------------


def on(device: str, architecture: str = "llama") -> LanguageModel:
    return LanguageModel(tiny_model(architecture, **layers(architecture, 1)).to(device))


@pytest.mark.parametrize(
    "failure", [torch.linalg.LinAlgError("not positive-definite"), RuntimeError("cusolver error: 7")]
)
@pytest.mark.parametrize(("pruner", "function"), [("sparsegpt", "cholesky"), ("alps", "cholesky_ex")])
def test_a_failing_factorisation_names_the_matrix(pruner, function, failure, monkeypatch):
    def fail(*_, **__):
        raise failure

    with pretended_gpus():
        model = on("cuda")
        monkeypatch.setattr(torch.linalg, function, fail)
        with pytest.raises(RunError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*(Cholesky|definite|cusolver)"):
            prune_model(model, PRUNERS[pruner], targets(model), Pattern(), tiny_tokens(), batch_size=4)


def test_time_and_names_are_those_of_the_devices_in_use():
    with pretended_gpus(3) as gpus:
        model = on("cuda:1")
        gpus.start_counting()
        with Stopwatch()("stage"):
            pass
        assert {what for _, what in gpus.waits} == {"synchronize cuda:1"}
        described = model.describe()
        assert (described["device"], environment(described)["device_name"]) == ("cuda:1", "Pretended 1")
        model.model.lm_head.to("cuda:2")
        gpus.start_counting()
        with Stopwatch()("stage"):
            pass
        assert {what for _, what in gpus.waits} == {"synchronize cuda:1", "synchronize cuda:2"}
        described = model.describe()
        assert environment(described)["device"] == "cuda:1, cuda:2"
        assert environment(described)["device_name"] == "Pretended 1, Pretended 2"


@pytest.mark.parametrize(
    ("processes", "device", "line"),
    [
        (3, "auto", "--device auto: 3 processes for the 2 GPUs of this machine; start 2"),
        (2, "cuda:1", "--device cuda:1: several processes take a GPU each; give auto, cuda or cpu"),
    ],
)
def test_processes_without_a_gpu_each_end_in_one_line(processes, device, line, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    flags = [
        "--model",
        "x/y",
        "--prune_method",
        "wanda",
        "--sparsity_ratio",
        "0.5",
        "--calib_data",
        "pydoc",
        "--eval_data",
        "pydoc",
    ]
    with pretended_gpus(2):
        for rank in range(processes):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert cli.main(lambda _: "", [*flags, "--device", device]) == 2
    assert capsys.readouterr().err == f"main.py: error: {line}\n"


@pytest.mark.parametrize("ask", ["high", "medium", "its other interface", "nothing"])
def test_gram_matrices_are_never_in_tf32(ask):
    seen, matmul = [], torch.backends.cuda.matmul
    before = matmul.fp32_precision
    spy = Pruner(
        lambda weight, *_: seen.append((torch.get_float32_matmul_precision(), matmul.allow_tf32)) or weight, "gram"
    )
    try:
        if ask in ("high", "medium"):
            torch.set_float32_matmul_precision(ask)
        elif ask != "nothing":
            matmul.fp32_precision = "tf32"
        asked = float32_matmul_precision()
        model = on("cpu")
        prune_model(model, spy, targets(model), Pattern(), tiny_tokens(), batch_size=4)
        assert set(seen) == {("highest", False)}
        assert float32_matmul_precision() == asked  # the program's own wish is its own again
        assert environment(model.describe())["float32_products"] == asked
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_a_model_is_spread_only_where_it_does_not_fit(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    source, empty = find_source(str(tmp_path / "model")), LanguageModel(tiny_model("llama"))
    size = sum(parameter.nbytes for parameter in empty.model.parameters())

    def devices(free: int, **needs) -> list[str]:
        with pretended_gpus(2, free):
            return [str(device) for device in load_model(source, "auto", "float32", **needs).devices]

    needed, least = (memory_needed(empty, tokens, (copies, 0)) for tokens, copies in ((100, 1), (0, 0)))
    enough, weights = size + needed, empty.prunable_parameters
    assert needed - least == 2 * 4 * 100 * 32 + 4 * weights
    assert memory_needed(empty, 0, (0, 17)) - least == 17 * weights
    assert devices(enough, held_tokens=100, beside=(1, 0)) == ["cuda:0"]
    assert devices(enough, held_tokens=1000, beside=(1, 0)) == ["cuda:0", "cuda:1"]
    assert devices(enough - 1, held_tokens=100, beside=(1, 0)) == ["cuda:0", "cuda:1"]


def test_several_gpus_keep_room_for_what_a_run_needs(tmp_path):
    tiny_model("llama", **layers("llama", 6)).save_pretrained(tmp_path / "model")
    source = find_source(str(tmp_path / "model"))
    model = load_model(source, "cpu", "float32")
    weights, beside = sum(p.nbytes for p in model.model.parameters()), memory_needed(model, 64, (0, 0))
    largest = max(sum(p.nbytes for p in block.parameters()) for block in model.blocks)
    free = beside + weights // 3 + largest  # of each of three: the weights leave all of `beside`
    with pretended_gpus(3, free) as gpus:
        spread = load_model(source, "cuda", "float32", held_tokens=64)
        assert {str(p.device) for p in spread.model.parameters()} == {"cuda:0", "cuda:1", "cuda:2"}
        assert all(gpus.free - held >= beside for held in gpus.live.values())
    with pretended_gpus(3, weights // 2 + largest):  # no room beside them, yet room for them
        spread = load_model(source, "cuda", "float32", held_tokens=10**6)
        assert {p.device.type for p in spread.model.parameters()} == {"cuda"}


def test_hidden_states_stay_with_their_block(folder_of, tmp_path):
    model_bytes = sum(parameter.nbytes for parameter in tiny_model("llama", **layers("llama", 2)).parameters())
    with pretended_gpus(2, int(ON_TWO * model_bytes)) as gpus:
        model = load_model(find_source(str(folder_of("llama") / "model")), "cuda", "float32")
        gpus.start_counting()
        prune_model(model, PRUNERS["wanda"], targets(model), Pattern(), tiny_tokens(), batch_size=4)
        back = {line: size for (line, kind), size in gpus.moved.items() if kind == "cuda:1->cuda:0"}
        assert sum(back.values()) < 4 * 24 * 32 * 4, back  # positions and the probe, less than one batch's hidden state
