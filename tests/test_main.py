"""The real command on the embedded model, small: every method, its results and its checkpoint."""

import json
import math
import os
import subprocess
import sys

import forking
import pytest
import torch
import transformers
from safetensors.torch import load_file
from shared import ROOT, SHARED, needs_model, needs_shared
from tiny import tiny_model

import main
from lib import RunConfig
from lib.allocation import ALLOCATIONS
from lib.config import prune_methods
from lib.pruners import PRUNERS

pytestmark = needs_model

SMALL = ["--calib_data", "pydoc", "--eval_data", "pydoc", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "4"]


def command(*flags: str) -> subprocess.CompletedProcess:
    """In a process of its own, with a thread a core: a real model is worth them."""
    run = [sys.executable, "main.py", *flags]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "CI": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded):
    """One whole run with everything on: (stdout, run.json, folders)."""
    out = tmp_path_factory.mktemp("main")
    flags = ["--prune_method", "wanda_ww", "--sparsity_ratio", "0.5", "--eval_dense", "--save", str(out / "results")]
    folders = ["--save_model", str(out / "pruned"), "--WW_metric_cache", str(out / "metric")]
    done = command("--model", str(embedded), *SMALL, *flags, *folders)
    assert done.returncode == 0, done.stderr
    folder = next(path for path in (out / "results").iterdir() if path.is_dir())
    return done, json.loads((folder / "run.json").read_text()), out


def test_run_json_holds_what_the_design_says(run):
    _, record, _ = run
    assert record["config"]["prune_method"] == "wanda_ww"
    assert {"id", "revision", "digest", "class", "parameters", "prunable_parameters", "coverage", "blocks"} <= set(
        record["model"]
    )
    assert len(record["layers"]) == 210
    assert set(record["layers"][0]) == {"name", "block", "shape", "score", "target_sparsity", "sparsity"}
    assert record["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-4)
    assert record["perplexity"]["windows"] == 4
    assert record["perplexity"]["tokens"] == 512
    assert 5 < record["perplexity"]["dense"] < record["perplexity"]["pruned"] < 500
    assert {"load", "metric", "allocate", "calibrate", "prune", "evaluate", "total"} <= set(record["seconds"])
    assert record["peak_memory_bytes"]["process"] > 5e8
    assert {"python", "torch", "transformers", "device", "dtype", "threads", "git_revision"} <= set(
        record["environment"]
    )
    assert record["events"] == []


def test_log_and_table(run, embedded):
    done, _, _ = run
    assert f"wanda_ww on {embedded}: 50.00%" in done.stdout
    assert sum("pruning 7 matrices to" in line for line in done.stderr.splitlines()) == 30
    assert "\r" not in done.stderr.partition("smollm2: 30 blocks")[2]  # bars are for terminals


def test_every_matrix_is_at_its_target(run):
    for layer in run[1]["layers"]:
        rows, columns = layer["shape"]
        assert abs(layer["sparsity"] - layer["target_sparsity"]) <= 0.51 / (rows * columns), layer["name"]


def test_checkpoint_loads_without_this_project(run):
    _, record, out = run
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "pruned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "pruned")
    layer = record["layers"][100]
    weight = model.get_submodule(layer["name"]).weight
    assert float((weight == 0).float().mean()) == pytest.approx(layer["sparsity"], abs=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 3
    assert (out / "pruned" / "generation_config.json").is_file()


def test_second_run_reads_the_cache_and_quiet_is_quiet(run, embedded):
    _, record, out = run
    flags = ["--prune_method", "magnitude_ww", "--sparsity_ratio", "0.5", "--save", str(out / "results"), "--quiet"]
    flags += ["--no-eval_wikitext", "--WW_metric_cache", str(out / "metric")]
    done = forking.run("main.py", ["--model", str(embedded), *SMALL, *flags])
    assert done.returncode == 0
    assert done.stderr == ""
    folder = next(path for path in (out / "results").iterdir() if path.name.startswith("magnitude_ww"))
    second = json.loads((folder / "run.json").read_text())
    assert [layer["score"] for layer in second["layers"]] == [layer["score"] for layer in record["layers"]]
    assert second["perplexity"] is None
    assert second["seconds"]["metric"] < 1
    assert len((out / "results" / "results.tsv").read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny model with the embedded model's tokenizer vocabulary folded onto its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, **{chr(97 + i): i + 1 for i in range(26)}}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    (folder / "letters.txt").write_text("".join(chr(97 + i * i % 26) for i in range(3000)))
    return folder


# Every method, and every pattern with every pruner and every allocation.
TYPES = ("unstructured", "2:4", "4:8")
METHODS = [
    (method, TYPES[([*PRUNERS].index(pruner) + [*ALLOCATIONS].index(allocation)) % len(TYPES)])
    for method, (pruner, allocation) in prune_methods().items()
]


@pytest.mark.parametrize(("method", "sparsity_type"), METHODS)
def test_every_registered_method_and_pattern(method, sparsity_type, tiny_folder, tmp_path):
    (tmp_path / "half.json").write_text('{"*": 0.5}')
    file = {"sparsities": str(tmp_path / "half.json")} if method.endswith("_file") else {}
    config = RunConfig(
        model=str(tiny_folder), prune_method=method, sparsity_ratio=0.5, sparsity_type=sparsity_type, seqlen=32, **file,
        nsamples=4, eval_windows=2, device="cpu", epsilon=0.4, calib_data=str(tiny_folder / "letters.txt"),
        eval_data=str(tiny_folder / "letters.txt"),
        cache_dir=str(tmp_path / "cache"), save=str(tmp_path / "out"), save_model=str(tmp_path / "pruned"),
    )  # fmt: skip
    record = main.run(config)
    assert record["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3 if sparsity_type == "unstructured" else 0.1)
    for layer in record["layers"]:
        assert layer["sparsity"] == pytest.approx(layer["target_sparsity"], abs=0.51 / (32 * 16))
        if sparsity_type != "unstructured":
            group = int(sparsity_type[2:])
            weight = load_file(tmp_path / "pruned" / "model.safetensors")[f"{layer['name']}.weight"]
            zeros = (weight.reshape(-1, group) == 0).sum(1)
            assert (zeros == round(layer["target_sparsity"] * group)).all()
            break
    if method.endswith("_ww"):
        assert len({layer["target_sparsity"] for layer in record["layers"]}) == 3 or sparsity_type != "unstructured"


@pytest.mark.parametrize(
    ("method", "flag", "tried"),
    [
        ("wanda_ww", {"epsilon": "auto"}, [6]),
        ("magnitude_ramp", {"ramp_beta": "auto"}, [6]),
        ("sparsegpt_search", {"mapping_type": "mixed"}, [0, "halved"]),
        ("alps", {"asymmetry": "auto"}, [5]),
        ("sparsegpt_search", {"asymmetry": "auto", "search_strength": "auto"}, [5, 0, 6]),
    ],
)
def test_what_was_tried_is_recorded_and_undone(method, flag, tried, tiny_folder, tmp_path):
    """The run that is told the parameter that was chosen gives the same model, and the windows held out are others."""
    options = {
        "model": str(tiny_folder), "prune_method": method, "sparsity_ratio": 0.5, "seqlen": 32, "nsamples": 8,
        "eval_windows": 2,
        "device": "cpu", "calib_data": str(tiny_folder / "letters.txt"), "eval_data": str(tiny_folder / "letters.txt"),
        "cache_dir": str(tmp_path / "cache"), "save": str(tmp_path / "out"),
    }  # fmt: skip
    record = main.run(RunConfig(**options, **flag))
    chosen = {}
    for search, count in zip(record["searches"], tried, strict=True):
        assert (search["calibration_windows"], search["held_out_windows"]) == (2, 4)
        assert search["seconds"] > 0
        if search["parameter"] == "sparsities":
            assert search["levels"] == pytest.approx([0.4, 0.5])
            assert math.isfinite(search["rise"])
            uniform = search["uniform"]
            assert count == 0
        elif count == "halved":
            *worse, last = search["tried"]
            assert all(trial["perplexity"] >= uniform for trial in worse)
            assert search["chosen"] == (last["value"] if last["perplexity"] < uniform else 0.0)
        else:
            assert len(search["tried"]) == count
            best = min(search["tried"], key=lambda trial: trial["perplexity"])
            assert search["chosen"] == best["value"]
            chosen[search["parameter"]] = search["chosen"]
    if chosen:
        assert chosen.keys() == flag.keys()
        again = main.run(RunConfig(**options, **chosen))
        measured = ["sparsities"] * (0 in tried) + ["search_strength"] * bool(chosen.get("search_strength"))
        assert [search["parameter"] for search in again["searches"]] == measured
        assert again["layers"] == record["layers"]
        assert again["perplexity"] == record["perplexity"]


@pytest.mark.parametrize(
    ("pattern", "levels"),
    [
        ({"sparsity_ratio": 0.8}, [0.5, 0.6]),
        ({"sparsity_ratio": 0.4}, [0.3, 0.4]),
        ({"sparsity_type": "3:4"}, [0.25, 0.5]),
    ],
)
def test_wanda_measures_sparsities_in_place_of_dearer_pruners(pattern, levels, tiny_folder, tmp_path):
    """At 60 % at most; with an asymmetric target the pruner itself does."""
    options = {
        "model": str(tiny_folder), "seqlen": 8, "nsamples": 40, "device": "cpu", "plan_only": True,
        "calib_data": str(tiny_folder / "letters.txt"), "cache_dir": str(tmp_path / "cache"), **pattern,
        "mapping_type": "layer_wise", "save": str(tmp_path / "out"),
    }  # fmt: skip
    runs = [
        main.run(RunConfig(prune_method=method, **options, **more))
        for method, more in (
            ("sparsegpt_search", {}),
            ("alps_search", {}),
            ("alps_search", {"asymmetry": 0.5}),
        )
    ]
    assert runs[0]["layers"] == runs[1]["layers"]
    first, second, own = (run["searches"][0] for run in runs)
    assert first["rise"] == second["rise"] != own["rise"]
    assert first["levels"] == pytest.approx(levels)
    windows = [(search["calibration_windows"], search["held_out_windows"]) for search in (first, own)]
    assert windows == [(8, 16), (10, 20)]


@pytest.mark.parametrize("stream", [False, True])
def test_where_nothing_is_pruned_nothing_is_recovered(stream, tiny_folder, tmp_path):
    config = RunConfig(
        model=str(tiny_folder), prune_method="magnitude", sparsity_ratio=0.0, recover="block", stream=stream,
        device="cpu", seqlen=32, eval_windows=2, eval_dense=True, eval_data=str(tiny_folder / "letters.txt"),
        save=str(tmp_path / "out"), save_model=str(tmp_path / "saved") if stream else None,
    )  # fmt: skip
    record = main.run(config)
    assert record["perplexity"]["pruned"] == record["perplexity"]["dense"]
    assert "without effect on this run: --recover" in [event["message"] for event in record["events"]]


@needs_shared
def test_dense_perplexity_is_the_published_codes(tmp_path, embedded):
    """29.935 on the first 64 windows of 512 of WikiText-2 test; two of them here, against transformers' own loss."""
    config = RunConfig(
        model=str(embedded), prune_method="magnitude", sparsity_ratio=0.0, seqlen=512, eval_windows=2, device="cpu",
        eval_data=str(SHARED / "data/wikitext-2-raw-v1/test.jsonl"), save=str(tmp_path),
    )  # fmt: skip
    record = main.run(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded)
    rows = (SHARED / "data/wikitext-2-raw-v1/test.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : 2 * 512].view(2, 512)
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss for window in tokens]
    assert record["perplexity"]["pruned"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
