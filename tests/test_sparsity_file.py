"""Sparsities out of a file, plans that stop before pruning, and both streamed as in memory."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import save_tokenizer
from tiny import tiny_model

import main
from lib import LanguageModel, RunConfig, RunError, cli, evaluator, results
from lib.allocation import Problem, allocate
from lib.allocation.file import read_entries

NAMES = [f"model.layers.{block}.{kind}" for block in range(2) for kind in ("self_attn.q_proj", "mlp.down_proj")]
SIZES = dict(zip(NAMES, (100, 300, 100, 300), strict=True))


@pytest.fixture
def problem(tmp_path):
    """A function from a file's text to what it makes of two blocks with two matrices each."""
    numbers = itertools.count()

    def solve(text, suffix=".json", group=None, sparsity=None):
        path = tmp_path / f"s{next(numbers)}{suffix}"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        blocks = dict(zip(NAMES, (0, 0, 1, 1), strict=True))
        options = {"sparsities": read_entries(str(path))}
        return allocate("file", Problem(SIZES, blocks, sparsity, {}, options=options), group)

    return solve


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        (dict(zip(NAMES, (0, 0.1, 0.2, 0.99), strict=True)), ".json", (0, 0.1, 0.2, 0.99)),
        ({"*": 0.5, "*.down_proj": 0.7, NAMES[3]: 0.8}, ".json", (0.5, 0.7, 0.5, 0.8)),
        ({"0": 0.5, "1": 0.25}, ".json", (0.5, 0.5, 0.25, 0.25)),
        ({"0": 0.5, "1": 0.25, "*q_proj": 0.1}, ".json", (0.1, 0.5, 0.1, 0.25)),
        ({"*.layers.[01].self*": 0.1, "*mlp*": 0}, ".json", (0.1, 0, 0.1, 0)),
        ("0,0.5\n1, 0.25\n", ".csv", (0.5, 0.5, 0.25, 0.25)),
        ("\ufeffname,sparsity\n*,0.5\n\n1,0.25\n", ".csv", (0.5, 0.5, 0.25, 0.25)),
        ("Name, Sparsity\n*,0.5\n1,0.25\n", ".csv", (0.5, 0.5, 0.25, 0.25)),
        ("name,sparsity,target_sparsity\n0,0.496,0.5\n1,,0.25\n", ".csv", (0.5, 0.5, 0.25, 0.25)),
    ],
)
def test_each_matrix_has_what_the_file_says(text, suffix, expected, problem):
    assert list(problem(text, suffix).values()) == list(expected)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ({"*": 0.5, "model.layers.0.self_atn.q_proj": 0.1}, ".json", "did you mean 'model.layers.0.self_attn.q_proj'?"),
        ({"*": 0.5, "*.k_proj": 0.1}, ".json", r"'\*.k_proj' is none of the model's prunable matrices"),
        ({"*": 0.5, "2": 0.1}, ".json", "block 2 has no prunable matrix; blocks go from 0 to 1"),
        ({"0": 0.5, NAMES[2]: 0.1}, ".json", f"says nothing of 1 of 4 matrices, such as {NAMES[3]}"),
        ({"*.down_proj": 0.7, "*": 0.5}, ".json", r"'\*.down_proj' is overridden by '\*' after it"),
        ({"*": 1}, ".json", r"'\*' has 1; a sparsity must lie in \[0, 0.99\]"),
        ({"*": -0.1}, ".json", r"'\*' has -0.1; a sparsity must lie"),
        ({"*": 70}, ".json", r"'\*' has 70; a sparsity must lie"),
        ('{"*": NaN}', ".json", r"'\*' has nan; a sparsity must lie"),
        ({"*": "half"}, ".json", "'\\*' has \"half\", which is no number"),
        ({"*": True}, ".json", r"'\*' has true, which is no number"),
        ({"*": {"q": 0.1}}, ".json", r"'\*' has a list or an object, which is no number"),
        ({"*": 0.5, "-1": 0.1}, ".json", "block -1 has no prunable matrix; blocks go from 0 to 1"),
        ("", ".json", "is no JSON object"),
        ('{"0": 0.5, "0": 0.6}', ".json", "'0' is given twice"),
        ("*,0,5", ".csv", "has a row of 3 cells and no header"),
        ("name,target_sparsity,sparsity\n*,0.5,0.9", ".csv", "target_sparsity 0.5, which is read, and sparsity 0.9"),
        ("0,0.5\n0,0.5", ".csv", "'0' is given twice"),
        ("[0.5]", ".json", "is no JSON object"),
        ("{", ".json", "cannot be read"),
        ("{}", ".json", "holds no sparsity"),
        ("", ".csv", "holds no sparsity"),
        ("0\n", ".csv", "has a row without a sparsity: 0"),
        ("name,block,alpha\na,0,2.5\n", ".csv", "has no column target_sparsity or sparsity: only name, block, alpha"),
        ("*: 0.5", ".yaml", "is neither a .json nor a .csv"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(text, suffix, message, problem):
    with pytest.raises(RunError, match=f"^--sparsities .*{suffix}: .*{message}"):
        problem(text, suffix)


def test_no_file(tmp_path):
    for path in tmp_path / "none.csv", tmp_path:
        with pytest.raises(RunError, match=r"^--sparsities .*\.csv: no such file"):
            read_entries(str(path))


def test_the_mean_of_the_file_and_the_ratio(problem):
    problem({"*q_proj": 0.1, "*down_proj": 0.5}, sparsity=0.4)  # (100 * 0.1 + 300 * 0.5) / 400
    with pytest.raises(RunError, match=r"^--sparsity_ratio 0.5: contradicts --sparsities .*, whose mean is 0.4000; "):
        problem({"*q_proj": 0.1, "*down_proj": 0.5}, sparsity=0.5)


def test_with_n_of_m_each_is_a_multiple(problem):
    assert list(problem({"0": 0.25, "1": 0.75}, group=4).values()) == [0.25, 0.25, 0.75, 0.75]
    with pytest.raises(RunError, match=rf"^--sparsity_type: {NAMES[2]} .* 0.7, which is no multiple of 1/4"):
        problem({"0": 0.25, "1": 0.7}, group=4)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny model with a tokenizer, and a text."""
    here = tmp_path_factory.mktemp("file")
    tiny_model("llama").save_pretrained(here / "model")
    save_tokenizer(here / "model")
    (here / "words.txt").write_text(" ".join(f"w{i * i % 63}" for i in range(800)))
    return here


@pytest.fixture
def settings(here, tmp_path):
    return {
        "model": str(here / "model"), "calib_data": str(here / "words.txt"), "eval_data": str(here / "words.txt"),
        "seqlen": 16, "nsamples": 4, "eval_windows": 2, "device": "cpu", "cache_dir": str(tmp_path / "cache"),
        "save": str(tmp_path / "out"),
    }  # fmt: skip


def targets(record: dict) -> dict[str, float]:
    return {layer["name"]: layer["target_sparsity"] for layer in record["layers"]}


@pytest.mark.parametrize("sparsity_type", ["unstructured", "4:8"])
def test_the_table_of_a_run_makes_it_again(sparsity_type, settings, tmp_path):
    """With the same pruner, in memory and streamed, the same weights come out as of the allocation itself."""
    common = {**settings, "sparsity_type": sparsity_type}
    first = RunConfig(
        **common, prune_method="wanda_ww", sparsity_ratio=0.5, epsilon=0.5, save_model=str(tmp_path / "first")
    )
    record = main.run(first)
    assert len(set(targets(record).values())) > 1
    weights = load_file(tmp_path / "first" / "model.safetensors")
    for stream in (False, True):
        again = RunConfig(
            **common, prune_method="wanda_file", sparsities=str(results.run_folder(first)), stream=stream,
            save_model=str(tmp_path / f"again{stream}"),
        )  # fmt: skip
        made = main.run(again)
        assert targets(made) == targets(record)
        assert made["sparsity"]["target"] == pytest.approx(0.5, abs=1e-9)
        assert made["sparsity"]["blocks"] == record["sparsity"]["blocks"]
        assert made["perplexity"] == record["perplexity"]
        found = {}
        for path in (tmp_path / f"again{stream}").glob("*.safetensors"):
            found |= load_file(path)
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    (line,) = [line for line in (tmp_path / "out" / "results.tsv").read_text().splitlines() if "_file" in line][:1]
    assert float(line.split("\t")[4]) == pytest.approx(record["sparsity"]["target"], abs=1e-6)


def test_a_file_is_checked_before_anything_is_run(settings, tmp_path, monkeypatch):
    (tmp_path / "wrong.json").write_text('{"0": 0.5}')
    monkeypatch.setattr(main, "plan", lambda *_, **__: pytest.fail("was run"))
    monkeypatch.setattr(evaluator, "measure_bos_effect", lambda *_, **__: pytest.fail("was run"))
    config = RunConfig(**settings, prune_method="wanda_file", sparsities=str(tmp_path / "wrong.json"))
    with pytest.raises(RunError, match=r"^--sparsities .*wrong.json: says nothing of 14 of 21 matrices"):
        main.run(config)


def test_the_file_and_the_method_go_together(settings, tmp_path):
    (tmp_path / "half.json").write_text('{"*": 0.5}')
    with pytest.raises(RunError, match=r"^--sparsities: is missing; --prune_method wanda_file"):
        RunConfig(**settings, prune_method="wanda_file")
    with pytest.raises(RunError, match=r"^--sparsities .*: is for --prune_method wanda_file$"):
        RunConfig(**settings, prune_method="wanda_ww", sparsity_ratio=0.5, sparsities=str(tmp_path / "half.json"))


def test_runs_are_told_apart_by_what_the_file_holds(settings, tmp_path):
    def name(path, share):
        (tmp_path / path).write_text(f'{{"*": {share}}}')
        return RunConfig(**settings, prune_method="wanda_file", sparsities=str(tmp_path / path)).run_name

    assert name("a.json", 0.5) == name("b.json", 0.5) != name("a.json", 0.6)


def test_a_streamed_run_goes_on_once_its_record_is_written(settings, tmp_path, monkeypatch):
    """The record has the file's path, where the journal's header has what the file holds."""
    (tmp_path / "half.json").write_text('{"*": 0.5}')
    file = {"prune_method": "wanda_file", "sparsities": str(tmp_path / "half.json")}
    config = RunConfig(**settings, **file, stream=True, save_model=str(tmp_path / "pruned"))

    def stop(_journal):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Journal, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            main.run(config)
    assert main.run(config)["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
    (tmp_path / "half.json").write_text('{"*": 0.25}')
    assert RunConfig(**settings, **file).run_name != config.run_name


def test_what_is_chosen_for_a_file_is_chosen_with_it(settings, tmp_path):
    (tmp_path / "some.json").write_text('{"*": 0.25, "2": 0.75}')
    config = RunConfig(
        **{**settings, "nsamples": 8}, prune_method="sparsegpt_file", sparsities=str(tmp_path / "some.json"),
        asymmetry="auto",
    )  # fmt: skip
    record = main.run(config)
    assert record["searches"][0]["parameter"] == "asymmetry"
    assert record["sparsity"]["blocks"] == pytest.approx([0.25, 0.25, 0.75], abs=1e-3)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("wanda_ww", {}),
        ("sparsegpt_owl", {"mapping_type": "layer_wise"}),
        ("magnitude_ramp", {"ramp_beta": "auto"}),
        ("wanda_search", {"stream": True}),
        ("alps", {"sparsity_type": "2:4"}),
    ],
)
def test_a_plan_is_what_the_run_does(method, more, settings, tmp_path, monkeypatch):
    """Its sparsities are the run's, and its table says them; neither weights nor perplexity are touched."""
    settings = {**settings, "nsamples": 8, "prune_method": method, "sparsity_ratio": 0.5, **more}
    whole = main.run(RunConfig(**settings, save_model=str(tmp_path / "pruned")))
    models = []
    made = LanguageModel.check
    monkeypatch.setattr(LanguageModel, "check", lambda model, *rest: (models.append(model), made(model, *rest)))
    monkeypatch.setattr(main, "apply_plan", lambda *_, **__: pytest.fail("was pruned"))
    config = RunConfig(**settings, plan_only=True, save_model=str(tmp_path / "never"), eval_dense=True)
    record = main.run(config)
    assert targets(record) == targets(whole)
    assert record["searches"] == [] or record["searches"][-1].get("chosen") == whole["searches"][-1].get("chosen")
    assert record["perplexity"] is None
    assert record["sparsity"]["achieved"] is None
    assert {layer["sparsity"] for layer in record["layers"]} == {None}
    assert not (tmp_path / "never").exists()
    assert record["run"].startswith(f"plan-{method}-0.5")
    assert dict(read_entries(str(results.run_folder(config))).sparsities) == targets(whole)
    assert "to be removed, none is yet" in results.summary(record)
    if not more.get("stream"):
        before = tiny_model("llama").state_dict()
        assert all(torch.equal(value, before[name]) for name, value in models[0].model.state_dict().items())


@pytest.mark.parametrize("plot", [False, True])
def test_a_plan_reads_no_text_that_it_does_not_need(plot, settings, tmp_path):
    """Neither of the data sets exists; the sparsities are drawn, with --plot or without."""
    settings = {**settings, "calib_data": "c4", "eval_data": "ptb"}
    method = {"prune_method": "alps_er", "asymmetry": "auto"}
    config = RunConfig(**settings, **method, sparsity_ratio=0.6, plan_only=True, plot=plot)
    record = main.run(config)
    assert (results.run_folder(config) / "report.html").is_file() == plot
    assert record["sparsity"]["target"] == 0.6
    assert (results.run_folder(config) / "plots" / "sparsity-depth.png").is_file()
    assert not (tmp_path / "out" / "results.tsv").exists()
    assert record["searches"] == []
    assert {"--asymmetry", "--eval_data", "--nsamples"} <= set(config.unused_flags())


def test_a_plan_of_an_analysis(settings):
    with pytest.raises(RunError, match=r"^--plan_only: stops before pruning, and --analyze_only"):
        RunConfig(**settings, plan_only=True, analyze_only=True)


def test_from_the_command_line(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logging", lambda quiet: None)
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    (tmp_path / "s.csv").write_text("name,sparsity\n*,0.5\n*.down_proj,0.75\n")
    words += ["--prune_method", "ria_file", "--sparsities", str(tmp_path / "s.csv"), "--quiet"]
    assert cli.main(lambda config: results.summary(main.run(config)), words) == 0
    assert "ria_file on " in capsys.readouterr().out
    assert cli.main(lambda config: results.summary(main.run(config)), [*words, "--sparsity_ratio", "0.5"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("main.py: error: --sparsity_ratio 0.5: contradicts --sparsities ")
