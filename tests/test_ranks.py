"""Two and three processes: the same sparsities, the same perplexity, and no hang.

Through the real launcher once, and where it has a part; else forked, with the environment that it gives.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import forking
import psutil
import pytest
import torch
import transformers
from shared import ROOT
from test_bad_input import make_texts, save_tokenizer
from tiny import ARCHITECTURES

from lib import ranks
from lib.stats import InputStats

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A Llama and a mixture whose experts see few tokens, each with a tokenizer, and a text."""
    here = tmp_path_factory.mktemp("ranks")
    make_texts(here)
    for architecture, changed in (("llama", {}), ("mixtral", {"num_local_experts": 12})):
        make, options, _ = ARCHITECTURES[architecture]
        torch.manual_seed(0)
        config = make(**{**options, "initializer_range": 0.15, **changed})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(here / architecture)
        save_tokenizer(here / architecture)
    return here


def flags(here: Path, model: str, method: str, out: Path, *more: str) -> list[str]:
    return [
        "main.py", "--model", str(here / model), "--prune_method", method, "--sparsity_ratio", "0.5", "--seqlen", "16",
        "--nsamples", "7", "--eval_windows", "9", "--batch_size", "2", "--device", "cpu", "--calib_data",
        str(here / "words.txt"), "--eval_data", str(here / "words.txt"), "--save", str(out), "--cache_dir",
        str(out / "cache"), *more,
    ]  # fmt: skip


def launched(processes: int, arguments: list[str], launcher: bool = False) -> subprocess.CompletedProcess:
    if processes == 1:
        return forking.run(arguments[0], arguments[1:])
    if not launcher:
        return forking.run_ranks(processes, arguments[0], arguments[1:])
    command, env = [*LAUNCH, "--num_processes", str(processes), *arguments], forking.environment()
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def running_ranks(job: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher's helpers come and go
            if "main.py" in process.cmdline():
                found.append(process)
    return found


def record_of(out: Path) -> dict:
    return json.loads(next(out.rglob("run.json")).read_text())


@pytest.mark.parametrize(
    ("processes", "model", "method", "more"),
    [
        (2, "llama", "sparsegpt_ww", []),
        (3, "llama", "wanda_ww", ["--stream", "--activation_memory", "0"]),
        (2, "mixtral", "wanda", []),
        (3, "mixtral", "sparsegpt_ww", ["--stream"]),
        (2, "llama", "magnitude_ww", []),
        (2, "llama", "wanda_owl", ["--stream"]),
        (2, "mixtral", "wanda", ["--recover", "block", "--nsamples", "4"]),
        (2, "llama", "wanda", ["--recover", "block", "model", "--recover_nsamples", "17"]),
        (2, "llama", "sparsegpt", ["--asymmetry", "0.5", "--fisher", "0.5"]),
        (2, "llama", "wanda_ww", ["--epsilon", "auto", "--nsamples", "12"]),
        (2, "llama", "wanda_search", ["--nsamples", "16"]),  # its strength does better than uniform by far
    ],
)
def test_ranks_share_the_work_and_not_the_result(processes, model, method, more, places, tmp_path):
    records = []
    for count in (1, processes):
        out = tmp_path / str(count)
        arguments = flags(places, model, method, out, "--save_model", str(out / "pruned"), *more)
        done = launched(count, arguments, launcher=method == "sparsegpt_ww" and not more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("prunable weights removed") == 1
        records.append(record_of(out))
        assert len((out / "results.tsv").read_text().splitlines()) == 2
        transformers.AutoModelForCausalLM.from_pretrained(out / "pruned")
    one, several = records
    assert several["perplexity"]["pruned"] == pytest.approx(one["perplexity"]["pruned"], rel=1e-3)
    # What search measures comes from gradients in bfloat16, which round otherwise in other batches.
    within = 1e-3 if method.endswith("_search") else None
    assert [layer["sparsity"] for layer in several["layers"]] == pytest.approx(
        [layer["sparsity"] for layer in one["layers"]], rel=0, abs=within or 0
    )
    assert [layer["target_sparsity"] for layer in several["layers"]] == pytest.approx(
        [layer["target_sparsity"] for layer in one["layers"]], abs=within
    )
    assert (one["environment"]["processes"], several["environment"]["processes"]) == (1, processes)


def test_an_analysis_is_shared_out(places, tmp_path):
    values = []
    for count in (1, 3):
        out = tmp_path / str(count)
        arguments = [
            "main.py", "--model", str(places / "llama"), "--analyze_only", "--WW_metric", "alpha_mid", "entropy",
            "--device", "cpu", "--save", str(out), "--cache_dir", str(out / "cache"),
        ]  # fmt: skip
        done = launched(count, arguments)
        assert done.returncode == 0, done.stderr
        values.append([layer["scores"] for layer in record_of(out)["layers"]])
    assert values[0] == values[1]


def test_a_dead_rank_ends_the_job_and_others_go_on(places, tmp_path):
    """Kill one of two ranks in the middle; the job ends soon, and one process finishes the work."""
    arguments = flags(places, "llama", "wanda", tmp_path, "--stream", "--save_model", str(tmp_path / "pruned"))
    command, env = [*LAUNCH, "--num_processes", "2", *arguments], forking.environment()
    job = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    ranks_of_job, deadline = [], time.time() + 100
    while not list(tmp_path.rglob("block-00000.json")) and time.time() < deadline:
        ranks_of_job = running_ranks(job)
        time.sleep(0.01)
    assert len(ranks_of_job) == 2
    ranks_of_job[1].send_signal(signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in stderr
    done = launched(1, arguments)
    assert done.returncode == 0, done.stderr
    assert record_of(tmp_path)["perplexity"]["windows"] == 9


@pytest.mark.parametrize("method", ["wanda", "wanda_search"])
def test_too_few_windows_for_the_ranks(method, places, tmp_path):
    """Of one window, and where a pruning on trial reads one."""
    given = ["--nsamples", "1" if method == "wanda" else "4"]
    done = launched(2, flags(places, "llama", method, tmp_path, *given))
    assert done.returncode != 0
    assert f"{' '.join(given)}: comes to 1 window at a time, less than one for each of 2 processes" in done.stderr


def test_one_process_where_several_were_asked_for(places, tmp_path):
    """accelerate starts a single process on CPUs unless its --multi_gpu is given; this must not pass for two."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    done = subprocess.run(
        [*command, *flags(places, "llama", "wanda", tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "main.py: error: accelerate launch: started one process" in done.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_work_is_dealt_evenly(size, monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: size)
    costs = [float(cost) for cost in (9, 9, 9, 4, 4, 2, 2, 1, 1, 1)]
    owners = ranks.balance(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == r) for r in range(size)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / size + max(costs)
    assert set(owners) == set(range(size))


def test_windows_are_split_without_loss(monkeypatch):
    windows = torch.arange(70).view(7, 10)
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.shard(windows))
    assert sorted(torch.cat(parts)[:, 0].tolist()) == windows[:, 0].tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("needs", ["diagonal", "gram"])
def test_statistics_add_up(needs):
    x = torch.randn(30, 8)
    whole, part, other = (InputStats(needs) for _ in range(3))
    for stats, tokens in ((whole, x), (part, x[:11]), (other, x[11:])):
        stats.add(tokens)
        stats.finish()
    sums = iter([other.tokens, other.gram if needs == "gram" else other.sum_squares])
    part.all_reduce(lambda tensor: tensor.add_(next(sums)))
    assert part.tokens == 30
    torch.testing.assert_close(part.sum_squares, whole.sum_squares)
    empty = InputStats.empty(needs, 8, torch.device("cpu"))
    assert (empty.tokens, float(empty.sum_squares.sum())) == (0, 0.0)
