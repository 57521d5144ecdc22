"""The command line: every field a flag, the published spellings, and the exit status."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import typing

import pytest
import torch
from shared import ROOT

from lib import cli
from lib.allocation.base import MAPPINGS
from lib.config import RunConfig, prune_methods
from lib.errors import RunError
from lib.metrics import METRICS
from lib.stopwatch import Stopwatch

FIELDS = dataclasses.fields(RunConfig)


@pytest.fixture
def unchecked(monkeypatch):
    """Flags alone: whether their values can be honoured is test_config's."""
    monkeypatch.setattr(RunConfig, "__post_init__", lambda self: None)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


# ---------------------------------------------------------------- parse


@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_every_field_has_a_flag(item, unchecked):
    name = item.name
    whole = typing.get_type_hints(RunConfig)[name]
    kind = next(iter(typing.get_args(whole)), whole)
    if typing.get_origin(whole) is tuple:
        flags, expected, kind = [f"--{name}", "one", "other"], ["one", "other"], list
    elif kind is bool:
        flags, expected = [f"--no-{name}" if item.default else f"--{name}"], not item.default
    else:
        expected = {str: "else", int: 7, float: 0.125}[kind]
        flags = [f"--{name}", str(expected)]
    config = cli.parse(flags)
    assert getattr(config, name) == expected
    assert type(getattr(config, name)) is kind
    assert dataclasses.replace(config, **{name: item.default}) == RunConfig()


@pytest.mark.parametrize("flag", ["--WW_metric", "--ww_metric"])
def test_both_spellings_of_the_metric(flag, unchecked):
    assert cli.parse([flag, "alpha_hill"]).ww_metric == ["alpha_hill"]


@pytest.mark.parametrize("flag", ["--WW_metric_cache", "--ww_metric_cache"])
def test_both_spellings_of_the_cache(flag, unchecked):
    assert cli.parse([flag, "folder"]).ww_metric_cache == "folder"


@pytest.mark.parametrize(
    ("flags", "evaluated"), [([], True), (["--eval_wikitext"], True), (["--no-eval_wikitext"], False)]
)
def test_evaluation_is_on_until_it_is_turned_off(flags, evaluated, unchecked):
    assert cli.parse(flags).eval_wikitext is evaluated


def test_the_published_command(model):
    config = cli.parse(
        f"--model {model} --cache_dir llm_weights --prune_method wanda_ww --WW_metric alpha_peak --WW_metric_cache "
        "./data/llama-7b-hf/ --sparsity_ratio 0.7 --save save_test/ --epsilon 0.3 --eval_wikitext".split()
    )
    assert (config.prune_method, config.sparsity, config.epsilon) == ("wanda_ww", 0.7, 0.3)
    assert config.ww_metric_cache == "./data/llama-7b-hf/"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity_rate", "0.5"], "--sparsity_rate: is no flag; did you mean --sparsity_ratio?"),
        (["--eval_wikitexts"], "--eval_wikitexts: is no flag; did you mean --eval_wikitext?"),
        (["--seeds=1"], "--seeds: is no flag; did you mean --seed?"),
        (["--sparsity", "0.5"], "--sparsity: is no flag; did you mean --sparsity_ratio or --sparsity_type?"),
        (["stray"], "stray: is no flag; see --help"),
    ],
)
def test_what_belongs_to_no_flag(flags, message, unchecked):
    with pytest.raises(RunError) as error:
        cli.parse(flags)
    assert str(error.value) == message


# ---------------------------------------------------------------- help


@pytest.fixture
def help_text(capsys, monkeypatch):
    """Without the usage, in one line."""
    monkeypatch.setenv("COLUMNS", "1000")  # a narrow terminal would break names
    with pytest.raises(SystemExit) as ended:
        cli.parse(["--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.partition("options:")[2].split())


@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_help_names_every_flag(item, help_text):
    for flag in (f"--{item.name}", *item.metadata.get("flags", ())):
        assert re.search(rf" {flag}(?!\w).{{0,60}}? {re.escape(item.metadata['help'])}", help_text)


def test_help_names_everything_registered(help_text):
    words = set(help_text.replace(",", " ").split())
    assert {*prune_methods(), *METRICS, *MAPPINGS} <= words


# ---------------------------------------------------------------- main


@pytest.fixture
def flags(model, monkeypatch):
    """A right command line; logging stays as it is for the other tests of this process."""
    monkeypatch.setattr(cli, "set_up_logging", lambda quiet: None)
    return ["--model", model, "--prune_method", "wanda", "--sparsity_ratio", "0.5"]


def test_success_prints_what_run_returns(flags, capsys):
    assert cli.main(lambda config: f"done with {config.sparsity_ratio}", flags) == 0
    assert tuple(capsys.readouterr()) == ("done with 0.5\n", "")


def test_a_wrong_flag_never_runs(flags, capsys):
    assert cli.main(lambda config: pytest.fail("was run"), [*flags, "--epsilon", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "main.py: error: --epsilon 2: must lie in [0, 1]\n"


def raising(error):
    def run(config):
        raise error

    return run


def test_an_error_is_one_line(flags, capsys):
    assert cli.main(raising(RunError("--model x: has\n  two lines")), flags) == 2
    assert tuple(capsys.readouterr()) == ("", "main.py: error: --model x: has two lines\n")


def test_out_of_memory_names_the_way_out(flags, capsys):
    assert cli.main(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB")), flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--batch_size 1" in err


@pytest.mark.parametrize(("stage", "helps"), [("prune", "another pruner"), ("calibrate", "--nsamples")])
def test_out_of_memory_names_the_innermost_stage_and_what_helps_it(stage, helps, flags, capsys):
    def run(_config):
        clock = Stopwatch()
        with clock("allocate"), clock(stage):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert cli.main(run, flags) == 2
    assert f"stage '{stage}'; try --stream, which holds one block at a time, or " in (err := capsys.readouterr().err)
    assert helps in err


@pytest.mark.parametrize(
    ("more", "advised"),
    [
        (["--prune_method", "alps_search", "--fisher", "0.5"], True),
        (["--epsilon", "auto"], True),
        (["--recover", "model"], False),  # which --stream refuses
        (["--stream", "--save_model", "pruned"], False),
    ],
)
def test_out_of_memory_advises_to_stream_what_can_be_streamed(more, advised, flags, capsys):
    assert cli.main(raising(torch.OutOfMemoryError("CUDA out of memory.")), [*flags, *more]) == 2
    assert ("try --stream" in capsys.readouterr().err) == advised


def test_interrupted(flags, capsys):
    assert cli.main(raising(KeyboardInterrupt()), flags) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted" in err
    assert err.count("\n") == 1


def test_whoever_reads_the_output_may_stop(flags, capfd, monkeypatch):
    """As `generate.py | head` does: no traceback, then or when Python ends."""
    read, write = os.pipe()
    os.close(read)
    out = os.dup(1)
    os.dup2(write, 1)
    try:
        with open(1, "w", closefd=False) as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert cli.main(lambda config: "what nobody reads", flags) == 141
    finally:
        os.dup2(out, 1)
        os.close(out)
        os.close(write)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["main.py", "script/finetune.py", "script/generate.py"])
def test_interrupted_while_libraries_are_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "psutil.py").write_text("import torch\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.Popen(
        [sys.executable, ROOT / command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background has ignored
    )  # fmt: skip
    assert done.stdout.readline() == b"importing\n"
    done.send_signal(signal.SIGINT)
    assert done.communicate(timeout=30) == (b"", b"")
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, OSError])
def test_a_bug_keeps_its_traceback(error, flags):
    with pytest.raises(error, match="a bug"):
        cli.main(raising(error("a bug")), flags)


@pytest.mark.parametrize("quiet", [False, True])
def test_logging_is_set_up_as_asked(quiet, flags, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "set_up_logging", asked.append)
    cli.main(lambda config: "", [*flags, *(["--quiet"] if quiet else [])])
    assert asked == [quiet]
