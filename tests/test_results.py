import csv
import json

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from lib import LanguageModel, RunConfig, RunError, plots, results, save_checkpoint
from lib.results.files import write_text


@pytest.fixture
def model():
    return LanguageModel(tiny_model("llama"))


def config_of(tmp_path, **options) -> RunConfig:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "prune_method": "wanda_ww", "sparsity_ratio": 0.5, **options}
    return RunConfig(**{"save": str(tmp_path / "out"), "calib_data": "pydoc", "eval_data": "pydoc", **options})


def record_of(config, perplexity=None) -> dict:
    layers = [
        {"name": "a", "block": 0, "shape": [2, 4], "score": 1.5, "target_sparsity": 0.25, "sparsity": 0.25},
        {"name": "b", "block": 1, "shape": [4, 6], "score": None, "target_sparsity": 0.5, "sparsity": 0.5},
    ]
    model = {"id": "tiny", "device": "cpu", "dtype": "float32", "prunable_parameters": 32, "coverage": 0.5}
    return results.build_record(config, model, layers, perplexity, {"total": 1.0}, [])


def test_run_folder(tmp_path):
    config = config_of(tmp_path)
    perplexity = {"dataset": "pydoc", "seqlen": 8, "windows": 3, "dense": None, "pruned": 12.34567}
    record = record_of(config, perplexity)
    assert record["sparsity"]["achieved"] == pytest.approx((8 * 0.25 + 24 * 0.5) / 32)
    assert record["sparsity"]["blocks"] == [0.25, 0.5]
    folder = results.write_run(config, record)
    results.append_result(config, record)
    results.append_result(config, record)
    assert json.loads((folder / "run.json").read_text()) == record
    rows = list(csv.DictReader((folder / "layers.csv").open()))
    assert [row["score"] for row in rows] == ["1.5", ""]
    assert [(row["rows"], row["columns"]) for row in rows] == [("2", "4"), ("4", "6")]
    text = (folder / "perplexity_wanda_ww_sparsity_0.5.txt").read_text()
    assert text == "method\tactual_sparsity\tppl_test\nwanda_ww\t0.4375\t12.3457\n"
    table = [line.split("\t") for line in (tmp_path / "out" / "results.tsv").read_text().splitlines()]
    assert len(table) == 3
    assert table[0] == list(results.COLUMNS)
    assert dict(zip(*table[:2], strict=True))["perplexity"] == "12.34567"
    assert "12.346" in results.summary(record)


def test_a_write_that_dies_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text(path, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunError, match=r"run\.json: cannot be written: disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_replaces_its_own_and_no_other(tmp_path, model):
    target = tmp_path / "pruned"
    config = config_of(tmp_path, save_model=str(target))
    results.prepare(config)
    save_checkpoint(model, target, record_of(config))
    assert json.loads((target / results.RECORD_FILE).read_text())["sparsity"]["target"] == 0.5
    results.prepare(config)
    save_checkpoint(model, target, record_of(config))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "pruned"}  # no temporary folder is left
    (target / results.RECORD_FILE).unlink()
    with pytest.raises(RunError, match="--save_model"):
        results.prepare(config)


def test_checkpoint_that_lost_zeros_on_the_way_is_refused(tmp_path, model, monkeypatch):
    first = model.matrices[0]
    first.write(torch.zeros(first.shape))
    own = model.model.save_pretrained

    def corrupt(folder, **options):
        own(folder, **options)
        file = next(folder.glob("*.safetensors"))
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(model.model, "save_pretrained", corrupt)
    with pytest.raises(RunError, match="--save_model"):
        save_checkpoint(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_generation_config_that_cannot_be_saved_does_not_lose_the_checkpoint(tmp_path, model):
    model.model.generation_config.temperature = 0.9  # as LLaMA-2's on the hub: set, yet sampling is off
    model.model.generation_config.do_sample = False
    save_checkpoint(model, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("perplexities", "labels"),
    [([6, 28], ["7", "10", "15", "20"]), ([24, 9e3], ["30", "100", "300", "1,000", "3,000"]), ([24, 1e7], ["10,000"])],
)
def test_perplexities_on_an_axis_are_plain_numbers(perplexities, labels):
    figure = Figure()
    axis = figure.subplots()
    axis.plot(perplexities)
    plots.set_perplexity_axis(axis, "wikitext2")
    figure.canvas.draw()
    low, high = axis.get_ylim()
    shown = [text.get_text() for text in axis.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert set(labels) <= set(shown)
    assert len(shown) <= 9
    assert all(float(label.replace(",", "")) > 0 for label in shown)
