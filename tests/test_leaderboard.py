"""script/benchmark/leaderboard.py: what main.py gives, shared, resumed and summed up over seeds."""

import csv
import json
import shutil
import subprocess

import forking
import pytest
from shared import ROOT
from test_bad_input import make_texts, save_tokenizer
from tiny import tiny_model

import main
from lib import RunError, cli


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    tiny_model("llama").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    make_texts(folder)
    (folder / "list.txt").write_text(
        "# a comment\n"
        "wanda uniform,owl,dlp 0.5 0,1\n"
        "alps search 0.5 0 --mapping_type layer_wise --asymmetry 0.5 --recover block  # and another\n"
        "wanda uniform 0.6 0 --calib_self 2 --recover model --recover_self 3\n"
        "wanda uniform 0.7 0 --calib_self 2\n"
        "wanda uniform 0.6 0\n"
    )
    return folder


def common(here) -> list[str]:
    return [
        "--model", str(here / "model"), "--seqlen", "16", "--nsamples", "8", "--device", "cpu", "--calib_data",
        str(here / "words.txt"), "--cache_dir", str(here / "cache"),
    ]  # fmt: skip


def board(here, *more: str) -> subprocess.CompletedProcess:
    texts = ["--eval_data", f"words={here / 'words.txt'}:8", f"fewer={here / 'words.txt'}:4"]
    list_and_place = [str(here / "list.txt"), "--save", str(here / "out")]
    return forking.run("script/benchmark/leaderboard.py", [*list_and_place, *texts, "--", *common(here), *more])


def rows(here) -> dict[str, dict]:
    with (here / "out/runs.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def done(here):
    process = board(here)
    assert process.returncode == 0, process.stderr
    return process


def test_each_run_is_what_the_command_gives(here, done, tmp_path):
    found = rows(here)
    assert list(found) == [
        "dense", "wanda 0.5 seed0", "wanda_owl 0.5 seed0", "wanda_dlp 0.5 seed0", "wanda 0.5 seed1",
        "wanda_owl 0.5 seed1", "wanda_dlp 0.5 seed1",
        "alps_search 0.5 seed0 --mapping_type layer_wise --asymmetry 0.5 --recover block",
        "wanda 0.6 seed0 --calib_self 2 --recover model --distill 0.5 --recover_self 3",
        "wanda 0.7 seed0 --calib_self 2", "wanda 0.6 seed0",
    ]  # fmt: skip
    for row in list(found.values())[1:]:
        flags = ["--prune_method", row["method"], "--sparsity_ratio", row["sparsity"], "--seed", row["seed"]]
        evaluation = ["--eval_data", str(here / "words.txt"), "--eval_windows", "8", "--save", str(tmp_path)]
        record = main.run(cli.parse([*flags, *row["settings"].split(), *common(here), *evaluation]))
        assert float(row["perplexity_words"]) == pytest.approx(record["perplexity"]["pruned"], rel=1e-4), row["run"]
        assert float(row["achieved"]) == pytest.approx(record["sparsity"]["achieved"], abs=1e-6)
        samples = "--calib_self" in row["settings"]
        assert (float(row["sampling_seconds"]) > 0) if samples else (row["sampling_seconds"] == "")


def test_texts_of_one_name_are_refused(here):
    texts = ["--eval_data", "pydoc:1", "pydoc:2"]
    refused = forking.run(
        "script/benchmark/leaderboard.py", [str(here / "list.txt"), "--save", str(here / "twice"), *texts]
    )
    assert refused.returncode == 1
    assert refused.stderr == "leaderboard.py: error: --eval_data: two texts have one name; give names, NAME=DATA\n"


def test_the_mean_accuracy_is_one_more_column(here, done, tmp_path):
    """That of main.py; runs from before stay as they are."""
    rows_of_task = [{"question": f"word{i} word{i + 1}", "answer": ("word1", "word2")[i % 2]} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_task))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "doc_to_choice: [word1, word2]\nmetric_list: [{metric: acc}]\n"
    )
    shutil.copytree(here / "out", tmp_path / "out")
    (tmp_path / "list.txt").write_text("wanda uniform 0.6,0.7 0\n")
    texts = ["--eval_data", f"words={here / 'words.txt'}:8", f"fewer={here / 'words.txt'}:4"]
    asked = [
        str(tmp_path / "list.txt"),
        "--save",
        str(tmp_path / "out"),
        *texts,
        "--tasks",
        str(tmp_path / "mine.yaml"),
    ]
    process = forking.run("script/benchmark/leaderboard.py", [*asked, "--task_limit", "5", "--", *common(here)])
    assert process.returncode == 0, process.stderr
    with (tmp_path / "out/runs.csv").open() as file:
        found = {row["run"]: row for row in csv.DictReader(file)}
    assert [run for run, row in found.items() if row["accuracy"]] == ["wanda 0.7 seed0"]
    flags = ["--prune_method", "wanda", "--sparsity_ratio", "0.7", "--no-eval_wikitext", "--save", str(tmp_path)]
    flags += ["--eval_zero_shot", "--tasks", str(tmp_path / "mine.yaml"), "--task_limit", "5"]
    record = main.run(cli.parse([*flags, *common(here)]))
    assert float(found["wanda 0.7 seed0"]["accuracy"]) == pytest.approx(record["zero_shot"]["mean"]["pruned"])
    head, *lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert head.endswith("| mean zero-shot acc | own text, s |")
    assert sum(bool(line.split("|")[-3].strip()) for line in lines[1:]) == 1
    other = forking.run("script/benchmark/leaderboard.py", [*asked, "--task_limit", "4", "--", *common(here)])
    assert "other tasks" in other.stderr


def test_what_is_done_is_not_done_again(here, done):
    before = (here / "out/runs.csv").read_text()
    lines = before.splitlines(keepends=True)
    (here / "out/runs.csv").write_text("".join(lines[:-1]))
    again = board(here)
    assert again.returncode == 0, again.stderr
    assert [line.partition("run: ")[2] for line in again.stderr.splitlines() if "run: " in line] == ["wanda 0.6 seed0"]
    assert [row["perplexity_words"] for row in rows(here).values()] == [
        row["perplexity_words"] for row in csv.DictReader(before.splitlines())
    ]


def test_what_a_line_may_say(here, tmp_path, monkeypatch):
    """It wins over the protocol, but for what all runs share."""
    monkeypatch.syspath_prepend(str(ROOT / "script/benchmark"))
    import leaderboard

    (tmp_path / "a.json").write_text('{"*": 0.5}')
    listed = tmp_path / "list.txt"

    def keys(line: str, *more: str) -> list[str]:
        listed.write_text(line + "\n")
        return [run.key for run in leaderboard.entries(listed, [*common(here), *more])]

    assert keys("wanda uniform 0.5 0 --nsamples 4") == ["wanda 0.5 seed0 --nsamples 4"]
    assert keys("wanda uniform 0.5 0", "--nsamples", "4", "--seed", "3") == ["wanda 0.5 seed0"]
    assert keys("wanda uniform 0.5 0 --sparsity_type 2:4") == ["wanda 0.5 seed0 --sparsity_type 2:4"]
    assert keys("sparsegpt uniform 0.6 0,1 --asymmetry 0", "--asymmetry", "0.5") == [
        "sparsegpt 0.6 seed0", "sparsegpt 0.6 seed1"
    ]  # fmt: skip
    assert keys("sparsegpt uniform 0.6 0", "--asymmetry", "0.5") == ["sparsegpt 0.6 seed0 --asymmetry 0.5"]
    assert keys("wanda uniform 0.6 0 --sparsity_type unstructured", "--sparsity_type", "2:4") == [
        "wanda 0.6 seed0 --sparsity_type unstructured"
    ]
    file = tmp_path / "a.json"
    assert keys(f"wanda file 0.5 0 --sparsities {file}") == [f"wanda_file 0.5 seed0 --sparsities {file}"]
    for flag in ("--seqlen 8", "--calib_data=pydoc", "--model x", "--dtype bfloat16"):
        with pytest.raises(RunError, match=f"--{flag[2:].split('=')[0].split()[0]} is one for all runs"):
            keys(f"wanda uniform 0.5 0 {flag}")
    with pytest.raises(RunError, match="is not `pruners allocations"):
        keys("wanda uniform 0.5")


def test_several_processes_fill_one_folder(tmp_path, monkeypatch):
    """What one is at, another leaves; and neither writes over what the other has found."""
    monkeypatch.syspath_prepend(str(ROOT / "script/benchmark"))
    import leaderboard

    texts = [leaderboard.Text("words", "words.txt", 8)]
    one, other = (leaderboard.Board(tmp_path, texts, [], []) for _ in range(2))
    row = {"method": "wanda", "sparsity": 0.5, "seed": 0, "perplexity_words": "9.0"}
    with one.turn("first") as first, other.turn("first") as again, other.turn("second") as second:
        assert (first, again, second) == (True, False, True)
        one.add(run="first", **row)
        other.add(run="second", **row)

    def fail() -> None:
        with one.turn("third"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with one.turn("second") as again:
        assert not again
    with other.turn("third") as third:  # which the one that failed has left
        assert third
    with (tmp_path / "runs.csv").open() as file:
        assert [found["run"] for found in csv.DictReader(file)] == ["first", "second"]
    assert {path.name for path in tmp_path.iterdir()} - {".locks"} == {
        "protocol.txt", "runs.csv", "table.md", "perplexity.png"
    }  # fmt: skip


def test_another_protocol_is_refused(here, done):
    refused = board(here, "--nsamples", "4")
    assert refused.returncode == 1
    assert "another protocol" in refused.stderr.splitlines()[-1]


def test_the_table_has_a_line_for_each_method_with_its_seeds(here, done):
    lines = (here / "out/table.md").read_text().splitlines()
    assert len(lines) == 2 + 8
    (wanda,) = [line.split(" | ") for line in lines if line.startswith("| 0.5 | `wanda` ")]
    assert "±" in wanda[2]
    assert wanda[4] == "2"
    assert (here / "out/perplexity.png").stat().st_size > 5000
