"""script/: the published settings, by the name of each model's script; the table of accuracies."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from shared import ROOT

METHODS = ("magnitude_ww", "wanda_ww", "sparsegpt_ww")


@pytest.fixture
def scripts(tmp_path):
    """A copy of script/ whose Python prints what it is called with."""
    shutil.copytree(ROOT / "script", tmp_path / "script", symlinks=True)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    return tmp_path / "script"


def run(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *words], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "model", "epsilons"),
    [
        ("llama_7b", "pinkmanlove/llama-7b-hf", (0.3, 0.2, 0.2)),
        ("llama_13b", "huggyllama/llama-13b", (0.5, 0.3, 0.3)),
        ("llama_30b", "huggyllama/llama-30b", (0.4, 0.3, 0.3)),
        ("llama_65b", "huggyllama/llama-65b", (0.4, 0.3, 0.3)),
        ("llama2_7b", "meta-llama/Llama-2-7b-hf", (0.5, 0.3, 0.2)),
        ("llama2_13b", "meta-llama/Llama-2-13b-hf", (0.4, 0.3, 0.3)),
        ("llama2_70b", "meta-llama/Llama-2-70b-hf", (0.4, 0.3, 0.3)),
    ],
)
def test_every_published_model_has_its_epsilons(name, model, epsilons, scripts):
    folder = f"save_test/{model.partition('/')[2]}"
    expected = [
        f"main.py --model {model} --prune_method {method} --sparsity_ratio 0.7 --epsilon {epsilon} "
        f"--cache_dir llm_weights --save {folder} --seed 1"
        for method, epsilon in zip(METHODS, epsilons, strict=True)
    ]
    assert run(scripts / f"{name}.sh", "--seed", "1").stdout.splitlines() == expected
    assert run(scripts / "published.sh", name, "--seed", "1").stdout.splitlines() == expected


def test_model_and_sparsity_are_overridden(scripts):
    (first, *_) = run(scripts / "llama_7b.sh", MODEL="mine", SPARSITY="0.5").stdout.splitlines()
    assert first.startswith("main.py --model mine --prune_method magnitude_ww --sparsity_ratio 0.5 --epsilon 0.3 ")


def test_an_unknown_name_is_refused(scripts):
    for words in ([], ["llama_8b"]):
        done = run(scripts / "published.sh", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is none of llama_7b llama_13b" in done.stderr


def test_two_runs_of_one_method_are_two_rows_of_the_table_of_accuracies(tmp_path):
    errors = dict.fromkeys("abc", 0.03)

    def write(name: str, tasks: dict[str, float]) -> str:
        entries = {task: {"pruned": {"acc": value, "acc_stderr": errors.get(task)}} for task, value in tasks.items()}
        found = {"stages": ["pruned"], "tasks": entries, "mean": {"pruned": 0.5}}
        record = {"run": name, "config": {"model": "one", "prune_method": "alps"}, "zero_shot": found}
        (tmp_path / name).write_text(json.dumps(record))
        return str(tmp_path / name)

    runs = [write("alps-0.5", {"a": 0.4, "b": 0.6}), write("alps-0.5-recover", {"a": 0.5, "b": 0.7, "c": 0.1})]
    command = [sys.executable, str(ROOT / "script/accuracy_table.py"), *runs]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() == [
        "| model | a | b | c | mean |",
        "|---|---|---|---|---|",
        "| `alps-0.5` | 40.0 ± 3.0 | 60.0 ± 3.0 | - | 50.0 ± 2.1 |",
        "| `alps-0.5-recover` | 50.0 ± 3.0 | 70.0 ± 3.0 | 10.0 ± 3.0 | 60.0 ± 2.1 |",
    ]
    errors["b"] = None  # a task of one document, or whose metric has none
    command[2:] = [write("alps-0.5", {"a": 0.4, "b": 0.6})]
    row = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert row == "| `alps-0.5` | 40.0 ± 3.0 | 60.0 | 50.0 |"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"script/benchmark/{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_a_boards_protocol_is_that_of_another_machine(tmp_path):
    (tmp_path / "some.jsonl").write_text("")
    plain = script("leaderboard")._without_folders
    words = ["--calib_data", f"c4:{tmp_path}/some.jsonl", f"{tmp_path}/some.jsonl", "a=pydoc:32", str(tmp_path)]
    assert [*map(plain, words)] == ["--calib_data", "c4:some.jsonl", "some.jsonl", "a=pydoc:32", str(tmp_path)]


def board(folder, nsamples: int, rows: list[str]) -> str:
    folder.mkdir()
    (folder / "protocol.txt").write_text(f"--model 'a b' --seqlen 512 --nsamples {nsamples} words=words.txt:4\n")
    lines = ["run,method,settings,sparsity,seed,perplexity_words,perplexity_others", *rows]
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_the_learning_curve_of_several_boards(tmp_path):
    recovered = "--recover model --recover_nsamples {} --distill 0.5"
    folders = [
        board(
            tmp_path / str(n), n,
            ["dense,dense,,0,,30,16", f"a,alps,,0.6,0,{90 - n},40", f"b,alps,,0.6,1,{92 - n},42",
             f"c,alps,{recovered.format(n)},0.6,0,50,{n}"],
        )
        for n in (64, 32)
    ]  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "script/benchmark/learning_curve.py"),
        *folders,
        "--save",
        str(tmp_path / "curve.png"),
    ]
    subprocess.run(command, check=True)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    module = script("learning_curve")
    plain, trained = "alps at 60 %", "alps --recover model --distill 0.5 at 60 %"
    curves = module.read([tmp_path / "64", tmp_path / "32"])
    assert curves == {
        ("words", plain): {64 * 512: [26, 28], 32 * 512: [58, 60]},
        ("others", plain): {64 * 512: [40, 42], 32 * 512: [40, 42]},
        ("words", trained): {64 * 512: [50], 32 * 512: [50]},
        ("others", trained): {64 * 512: [64], 32 * 512: [32]},
    }
    panels = module.draw(curves).axes
    assert [line.get_xydata().tolist() for line in panels[0].lines] == [
        [[16384, 59], [32768, 27]], [[16384, 50], [32768, 50]],
    ]  # fmt: skip


def test_boards_that_no_learning_curve_can_be_drawn_of(tmp_path):
    read = script("learning_curve").read
    row = "a,alps,--recover model --recover_nsamples 64,0.6,0,40,41"
    board(tmp_path / "32", 32, [row])
    assert list(read([tmp_path / "32"])) == [  # on more windows than it is calibrated on
        (text, "alps --recover model --recover_nsamples 64 at 60 %") for text in ("words", "others")
    ]
    board(tmp_path / "dense", 64, ["dense,dense,,0,,30,16"])
    board(tmp_path / "longer", 64, [row])
    (tmp_path / "longer/protocol.txt").write_text("--model 'a b' --seqlen=1024 --nsamples=32 words=words.txt:4\n")
    board(tmp_path / "unknown", 64, [row])
    (tmp_path / "unknown/protocol.txt").write_text("--model m\n")
    for folders, reason in (
        ([tmp_path], f"{tmp_path}: no leaderboard is there (protocol.txt)"),
        ([tmp_path / "dense"], f"{tmp_path}/dense: its runs prune nothing"),
        ([tmp_path / "unknown"], f"{tmp_path}/unknown: its runs have no --nsamples, or no --seqlen (protocol.txt)"),
        (
            [tmp_path / "32", tmp_path / "longer"],
            f"{tmp_path}/longer: its runs differ in more than --nsamples from those of {tmp_path}/32",
        ),
    ):
        with pytest.raises(SystemExit) as raised:
            read(folders)
        assert str(raised.value) == f"learning_curve.py: error: {reason}"
