"""A run that dies at any moment, and one that a full disk or a broken file stops, goes on to the same result."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forking import run
from test_bad_input import make_texts, save_tokenizer
from tiny import tiny_model

KILLS = 14


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    here = tmp_path_factory.mktemp("resume")
    tiny_model("llama").save_pretrained(here / "model", max_shard_size="20KB")
    save_tokenizer(here / "model")
    make_texts(here)
    return here


def flags(here: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(here / "model"), "--prune_method", "sparsegpt_ww", "--sparsity_ratio", "0.5", "--stream",
        "--seqlen", "16", "--nsamples", "4", "--eval_windows", "4", "--batch_size", "2", "--device", "cpu",
        "--calib_data", str(here / "words.txt"), "--eval_data", str(here / "words.txt"), "--eval_dense", "--save",
        str(out / "results"), "--cache_dir", str(out / "cache"), "--save_model", str(out / "pruned"), *more,
    ]  # fmt: skip


def result_of(out: Path) -> tuple[dict[str, str], dict]:
    """The digests of the checkpoint's files, and what run.json says of the result."""
    assert {path.name for path in out.iterdir()} <= {"cache", "pruned", "results"}, "something is left behind"
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "pruned").iterdir()
        if path.name != "alphapruning.json"  # holds times
    }
    record = json.loads(next((out / "results").rglob("run.json")).read_text())
    assert not list((out / "results").rglob("journal"))
    return digests, {key: record[key] for key in ("perplexity", "sparsity", "layers", "events")}


@pytest.fixture(scope="module")
def uninterrupted(here) -> tuple[dict, dict, list[str]]:
    """The result of a run that nothing disturbed, and its events' names."""
    out, names = here / "whole", here / "events"
    done = run("tests/killed.py", ["0", str(names), *flags(here, out)])
    assert done.returncode == 0, done.stderr
    return *result_of(out), names.read_text().splitlines()


def test_killed_at_a_dozen_moments(here, uninterrupted):
    """Evenly spread over all that happens, with every stage and a half-written shard, record and cache among them."""
    digests, said, events = uninterrupted
    moments = {1 + round(i * (len(events) - 1) / (KILLS - 1)) for i in range(KILLS)}
    wanted = ("half of alpha_peak.json", "half of block-00001.json", "half of plan.json", "after header.json")
    moments |= {1 + events.index(name) for name in wanted}
    moments |= {1 + next(i for i, name in enumerate(events) if name.startswith("half of model-00003"))}
    assert len(moments) >= 12

    def killed_and_resumed(moment: int):
        out = here / f"killed-{moment}"
        died = run("tests/killed.py", [str(moment), str(out), *flags(here, out)])
        done = run("main.py", flags(here, out))
        return moment, died, done, out

    with ThreadPoolExecutor(2) as pool:
        for moment, died, done, out in pool.map(killed_and_resumed, sorted(moments)):
            assert died.returncode == -9, (moment, events[moment - 1], died.stderr)
            assert done.returncode == 0, (moment, events[moment - 1], done.stderr)
            assert result_of(out) == (digests, said), (moment, events[moment - 1])


def test_a_resumed_run_says_so_and_skips_what_is_done(here, uninterrupted):
    events = uninterrupted[2]
    moment, out = 1 + events.index("before block-00002.json"), here / "says"
    run("tests/killed.py", [str(moment), str(out), *flags(here, out)])
    done = run("tests/killed.py", ["0", str(here / "second"), *flags(here, out)])
    assert "resuming after block 2 of 3" in done.stderr
    assert "pruning 7 matrices" in done.stderr
    assert done.stderr.count("pruning 7 matrices") == 1
    second = (here / "second").read_text().splitlines()
    assert "squared_singular_values" not in second
    assert second.count("leaves") < events.count("leaves")
    assert result_of(out) == uninterrupted[:2]


def test_the_dense_model_beside_it_is_resumed_too(here, tmp_path):
    """Its blocks come from the original files, though the pruned ones have taken their place."""
    more, (whole, cut) = ("--asymmetry", "0.5", "--recover", "block"), (tmp_path / "whole", tmp_path / "cut")
    done = run("tests/killed.py", ["0", str(tmp_path / "names"), *flags(here, whole, *more)])
    assert done.returncode == 0, done.stderr
    moment = 1 + (tmp_path / "names").read_text().splitlines().index("before block-00002.json")
    assert run("tests/killed.py", [str(moment), str(cut), *flags(here, cut, *more)]).returncode == -9
    assert run("main.py", flags(here, cut, *more)).returncode == 0
    assert result_of(cut) == result_of(whole)


def test_what_was_measured_for_the_plan_is_not_measured_again(here, tmp_path):
    """The Fisher information, the marginal losses and the trials of a run that takes gradients."""
    more = ["--prune_method", "alps_search", "--fisher", "0.5", "--mapping_type", "layer_wise"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("tests/killed.py", ["0", str(tmp_path / "names"), *flags(here, whole, *more)])
    assert done.returncode == 0
    before = (tmp_path / "names").read_text().splitlines().index("half of plan.json")
    assert run("tests/killed.py", [str(before + 1), str(cut), *flags(here, cut, *more)]).returncode == -9
    assert run("tests/killed.py", ["0", str(tmp_path / "again"), *flags(here, cut, *more)]).returncode == 0
    assert result_of(cut)[0] == result_of(whole)[0]
    again = (tmp_path / "again").read_text().splitlines()
    assert again.index("half of plan.json") < before / 2
    assert not any("trial" in name or "fisher" in name for name in again)


def test_restart_begins_anew(here, uninterrupted):
    moment, out = 1 + uninterrupted[2].index("before block-00002.json"), here / "restart"
    run("tests/killed.py", [str(moment), str(out), *flags(here, out)])
    done = run("main.py", flags(here, out, "--restart"))
    assert done.stderr.count("pruning 7 matrices") == 3
    assert result_of(out) == uninterrupted[:2]


def test_another_configuration_is_refused(here, uninterrupted):
    moment, out = 1 + uninterrupted[2].index("before block-00001.json"), here / "other"
    run("tests/killed.py", [str(moment), str(out), *flags(here, out)])
    done = run("main.py", flags(here, out, "--epsilon", "0.1"))
    assert done.returncode == 2
    assert "--epsilon was 0.2 and is 0.1; --restart begins anew" in done.stderr


def test_a_full_disk_is_one_error_and_no_loss(here, uninterrupted):
    out = here / "full"
    # Of this size a record can be written, and a block's shard cannot.
    done = run("main.py", flags(here, out, "--quiet"), file_size=12_000)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "model-00002-of-00004.safetensors: cannot be written" in done.stderr
    assert run("main.py", flags(here, out)).returncode == 0
    assert result_of(out) == uninterrupted[:2]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("unreadable shard", "model-00002-of"),
        ("truncated shard", "model-00002-of"),
        ("removed tokenizer", "its tokenizer"),
    ],
)
def test_a_broken_model_is_one_error_and_no_loss(broken, says, here, uninterrupted, tmp_path):
    """Half the work is done when the model's folder breaks; mended, the run goes on."""
    moment, out = 1 + uninterrupted[2].index("before block-00001.json"), tmp_path
    run("tests/killed.py", [str(moment), str(out / "x"), *flags(here, out)])
    path = next((here / "model").glob("tokenizer.json" if "tokenizer" in broken else "model-00002-of*"))
    content = path.read_bytes()
    path.unlink()
    try:
        if broken == "unreadable shard":
            path.mkdir()
        elif broken == "truncated shard":
            path.write_bytes(content[: len(content) // 2])
        done = run("main.py", flags(here, out, "--quiet"))
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "--model" in done.stderr
    assert says in done.stderr
    assert run("main.py", flags(here, out)).returncode == 0
    assert result_of(out) == uninterrupted[:2]
