"""A parameter of an allocation or a pruner: declared in one place, and everywhere by itself."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import save_tokenizer
from tiny import tiny_model

import main
from lib import cli, results
from lib.allocation import ALLOCATIONS
from lib.allocation.base import Allocation, allocation
from lib.allocation.budget import fit_budget
from lib.config import RunConfig
from lib.masks import lowest_of_matrix
from lib.metrics.base import metric
from lib.options import Option, options_of, with_options
from lib.pruners.base import Pruner, mask_of, pruner
from lib.run_flags import OPTIONED

TILT = Option("seesaw_tilt", 0.1, "how far odd blocks go up", within=(0, 0.5), auto=(0.0, 0.2), label="tilt")
POWER = Option("last_power", 1.0, "later columns count more by this power", above=0)

ORDER = Option("moment_order", 1.0, "moment of the eigenvalues", above=0)


@pytest.fixture
def kind(monkeypatch):
    """The configuration with an allocation, a pruner and a metric of a few lines, each with a parameter."""
    for registry in OPTIONED:
        monkeypatch.setattr(registry, "_entries", dict(registry.items()))

    @allocation("seesaw", options=(TILT,))
    def seesaw(problem):
        tilt = problem.options["seesaw_tilt"]
        ratios = {name: 1 + tilt * (-1) ** (block + 1) for name, block in problem.blocks.items()}
        return fit_budget(ratios, problem.sizes, problem.sparsity)

    @pruner("last", needs="nothing", options=(POWER,))
    def last(weight, _stats, sparsity, pattern, last_power):
        scores = weight.abs() * torch.arange(1, weight.shape[1] + 1) ** last_power
        return weight.masked_fill(mask_of(scores, sparsity, pattern, lowest_of_matrix), 0)

    @metric("moment", sign=+1, options=(ORDER,))
    def moment(spectrum, moment_order):
        return float(spectrum.eigenvalues.pow(moment_order).sum())

    return with_options(*OPTIONED)(RunConfig)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A right command line but for --prune_method."""
    monkeypatch.setattr(cli, "set_up_logging", lambda quiet: None)
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"w{i * i % 63}" for i in range(400)))
    folders = {"model": "model", "save": "out", "calib_data": "words.txt", "cache_dir": "cache", "save_model": "pruned"}
    words = ["--sparsity_ratio", "0.5", "--no-eval_wikitext", "--device", "cpu", "--seqlen", "16", "--nsamples", "4"]
    return [*words, *(word for flag, name in folders.items() for word in (f"--{flag}", str(tmp_path / name)))]


def command(kind, words) -> int:
    return cli.main(lambda config: results.summary(main.run(config)), words, kind)


def record(tmp_path) -> dict:
    (path,) = tmp_path.glob("out/*/run.json")
    return json.loads(path.read_text())


def test_an_allocations_parameter_reaches_it_from_the_command_line(kind, words, tmp_path):
    assert command(kind, [*words, "--prune_method", "magnitude_seesaw", "--seesaw_tilt", "0.4"]) == 0
    made = record(tmp_path)
    assert made["run"].startswith("magnitude_seesaw-0.5-tilt0.4-seed0-")
    assert made["config"]["seesaw_tilt"] == 0.4
    assert [layer["target_sparsity"] for layer in made["layers"]] == pytest.approx([0.3] * 7 + [0.7] * 7)
    assert [layer["sparsity"] for layer in made["layers"]] == pytest.approx([0.3] * 7 + [0.7] * 7, abs=1e-3)
    assert "| `--seesaw_tilt` | 0.4 |" in (tmp_path / "pruned" / "README.md").read_text()


def test_auto_tries_what_the_option_says(kind, words, tmp_path):
    assert command(kind, [*words, "--prune_method", "magnitude_seesaw", "--seesaw_tilt", "auto"]) == 0
    (search,) = record(tmp_path)["searches"]
    assert (search["parameter"], [trial["value"] for trial in search["tried"]]) == ("seesaw_tilt", [0.0, 0.2])


def test_a_pruners_parameter_reaches_it(kind, words, tmp_path):
    """With so large a power the first columns go, whatever their weights."""
    assert command(kind, [*words, "--prune_method", "last", "--last_power", "30"]) == 0
    made = record(tmp_path)
    assert made["run"].startswith("last-0.5-last_power30-seed0-")
    weight = load_file(tmp_path / "pruned" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert (weight[:, :12] == 0).all()
    assert (weight[:, 20:] != 0).all()


@pytest.mark.parametrize("order", [1, 2])
def test_a_metrics_parameter_reaches_it_and_its_cache(order, kind, words, tmp_path):
    """Of the singular values' squares: their sum is the squared norm, that of their squares the Gram matrix's."""
    flags = ["--prune_method", "magnitude_ww", "--WW_metric", "moment", "--moment_order", str(order)]
    assert command(kind, [*words, *flags, *(["--plot"] if order == 2 else [])]) == 0
    made = record(tmp_path)
    assert made["run"].startswith(f"magnitude_ww-0.5-moment-moment_order{order}-eps0.2-seed0-")
    layer = made["layers"][3]
    weight = load_file(tmp_path / "model" / "model.safetensors")[f"{layer['name']}.weight"].half().double()
    expected = float(weight.square().sum() if order == 1 else (weight @ weight.T).square().sum())
    assert layer["score"] == pytest.approx(expected, rel=1e-6)
    name = "moment" if order == 1 else "moment-moment_order2"
    assert len(list(tmp_path.glob(f"cache/ww_metric/*/{name}.json"))) == 1


def test_auto_is_for_one_parameter_of_an_allocation():
    with pytest.raises(ValueError, match="can choose one parameter"):
        Allocation(lambda _: {}, options=(TILT, dataclasses.replace(TILT, name="other")))
    with pytest.raises(ValueError, match="parameters of allocations"):
        Pruner(lambda *_: None, "nothing", options=(TILT,))


@pytest.mark.parametrize(
    ("method", "given", "line"),
    [
        ("magnitude_seesaw", ["--seesaw_tilt", "0.6"], "--seesaw_tilt 0.6: must lie in [0, 0.5]"),
        ("magnitude_seesaw", ["--seesaw_tilt", "far"], "--seesaw_tilt: 'far' is neither a number nor auto"),
        ("last", ["--seesaw_tilts", "1"], "--seesaw_tilts: is no flag; did you mean --seesaw_tilt?"),
        ("last", ["--last_power", "0"], "--last_power 0: must be above 0"),
        ("last", ["--last_power", "nan"], "--last_power nan: must be above 0"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(method, given, line, kind, words, capsys):
    assert command(kind, [*words, "--prune_method", method, *given]) == 2
    assert capsys.readouterr().err == f"main.py: error: {line}\n"


def test_what_it_does_not_read_is_said(kind, words):
    config = cli.parse([*words, "--prune_method", "magnitude", "--seesaw_tilt", "0.2", "--last_power", "2"], kind)
    assert config.unused_flags()[-2:] == ["--seesaw_tilt", "--last_power"]


def test_help_has_it_among_the_methods(kind, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"], kind)
    method = capsys.readouterr().out.partition("\nmethod:")[2].partition("\ncalibration:")[0]
    assert "how far odd blocks go up (default: 0.1)" in " ".join(method.split())
    assert "--last_power POWER" in method


def test_a_name_is_declared_once_or_alike(monkeypatch):
    monkeypatch.setattr(ALLOCATIONS, "_entries", dict(ALLOCATIONS.items()))
    ALLOCATIONS.add("one", Allocation(lambda _: {}, options=(TILT,)))
    ALLOCATIONS.add("other", Allocation(lambda _: {}, options=(TILT,)))
    assert options_of(ALLOCATIONS)["seesaw_tilt"] is TILT
    ALLOCATIONS.add("third", Allocation(lambda _: {}, options=(Option("seesaw_tilt", 0.2, "another"),)))
    with pytest.raises(ValueError, match="--seesaw_tilt is declared twice"):
        options_of(ALLOCATIONS)


def test_an_option_does_not_take_the_name_of_a_flag(monkeypatch):
    monkeypatch.setattr(ALLOCATIONS, "_entries", dict(ALLOCATIONS.items()))
    ALLOCATIONS.add("one", Allocation(lambda _: {}, options=(Option("nsamples", 1.0, "not the windows"),)))
    with pytest.raises(ValueError, match="--nsamples is a flag already"):
        with_options(ALLOCATIONS)(RunConfig)
