"""Zero-shot tasks: what the harness's own command gives of the saved checkpoint, in memory, streamed and by ranks."""

import csv
import json
import logging
import os
import sys
from pathlib import Path

import forking
import lm_eval
import pytest
import torch
import transformers
from hub import Hub
from huggingface_hub import constants
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from tiny import ARCHITECTURES, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import main
from lib import (
    LanguageModel,
    RunConfig,
    RunError,
    find_source,
    harness_tasks,
    open_model,
    ranks,
    results,
    workspace,
    zero_shot,
)
from lib import hub as doors
from lib.activations import Store
from lib.evaluator import Evaluator
from lib.harness import HarnessModel
from lib.harness_tasks import load_tasks

STOCK = ("arc_easy", "arc_challenge", "openbookqa", "winogrande", "piqa", "boolq")
FOLDERS = ("arc", "openbookqa", "winogrande", "piqa", "super_glue/boolq", "humaneval", "hellaswag")
WORDS = ["river", "stone", "house", "garden", "light", "water", "winter", "summer", "bread", "glass", "paper", "cloud"]


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i * (seed + 1)) % len(WORDS)] for i in range(words))


def choice(seed: int) -> dict:
    options = [text(seed + i, 1 + (seed + i) % 3) for i in range(4)]
    return {"choices": {"text": options, "label": list("ABCD")}, "answerKey": "ABCD"[seed % 4]}


DOCUMENTS = {
    "arc_easy": [{"id": str(i), "question": text(i, 3 + i), **choice(i)} for i in range(9)],
    "arc_challenge": [{"id": str(i), "question": text(i, 9), **choice(i + 3)} for i in range(4)],
    "openbookqa": [{"id": str(i), "question_stem": text(i, 5), **choice(i + 1)} for i in range(5)],
    "winogrande": [
        {"sentence": f"the {text(i, 3)} and _ was {text(i, 2)}.", "option1": "river", "option2": "stone", "answer": a}
        for i, a in enumerate("1221")
    ],
    "piqa": [{"goal": text(i, 4), "sol1": text(i, 3), "sol2": text(i + 5, 6), "label": i % 2} for i in range(5)],
    "boolq": [{"passage": text(i, 30), "question": text(i, 3), "label": i % 2, "idx": i} for i in range(5)],
}


@pytest.fixture(scope="module", autouse=True)
def few_folders():
    """The stock definitions of a few tasks: to read all 14,000 takes ten seconds."""
    own, at_home = TaskIndex._iter_yaml_files, Path(lm_eval.__file__).parent / "tasks"

    def files(root):
        for folder in [root / name for name in FOLDERS] if root == at_home else [root]:
            yield from own(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(files))
        yield


@pytest.fixture(autouse=True)
def anew():
    harness_tasks._manager.cache_clear()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub() as running, pytest.MonkeyPatch.context() as patch:
        running.add_tasks(DOCUMENTS)
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
            patch.delenv(name)
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("token") / "none"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(doors, "PATIENCE", 1.0)
        patch.setenv("HF_ENDPOINT", running.url)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield running


def save_model(folder: Path, bos_in_front: bool, **options) -> Path:
    """A tiny Llama whose byte-level tokenizer knows every text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(options.get("dtype", torch.float32)).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator([text(i, 40) for i in range(9)], trainer)
    if bos_in_front:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), bos_in_front=True)


def config_of(model: Path, out: Path, **options) -> RunConfig:
    options = {
        "prune_method": "magnitude", "sparsity_ratio": 0.5, "seqlen": 16, "device": "cpu", "eval_wikitext": False,
        "eval_zero_shot": True, "tasks": STOCK, "batch_size": 4, "cache_dir": str(out / "cache"),
        "save": str(out / "results"), "save_model": str(out / "pruned"), **options,
    }  # fmt: skip
    return RunConfig(model=str(model), **options)


def of_the_command(model: Path, out: Path, tasks: tuple[str, ...], *more: str, arguments: str = "") -> dict:
    """What `lm_eval` itself writes of a checkpoint."""
    argv = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}{arguments}"]
    argv += ["--tasks", ",".join(tasks), "--batch_size", "4", "--device", "cpu", "--output_path", str(out), *more]
    level = logging.getLogger().level
    with pytest.MonkeyPatch.context() as patch, doors.data_sets(str(out / "its cache"), "lm_eval"):
        patch.setattr(sys, "argv", argv)
        cli_evaluate()
    logging.getLogger().setLevel(level)
    return json.loads(next(out.rglob("results_*.json")).read_text())


def same_numbers(ours: dict, theirs: dict, when: str = "pruned") -> None:
    """Every metric and its standard error, to the last digit."""
    for name, task in ours["tasks"].items():
        expected = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
        assert task[when] == {k: None if v == "N/A" else v for k, v in expected.items()}, name
        assert task["version"] == theirs["versions"][name]
        assert {"effective": task["documents"], "original": task["of"]} == theirs["n-samples"][name]


@pytest.mark.parametrize(
    ("stream", "limit", "dtype"), [(False, None, "float32"), (True, 3, "float32"), (False, 4, "bfloat16")]
)
def test_equal_to_the_harness_on_the_saved_checkpoint(stream, limit, dtype, hub, folder, tmp_path):
    model = folder
    if dtype != "float32":
        model = save_model(tmp_path / "model", bos_in_front=True, dtype=getattr(torch, dtype))
    record = main.run(
        config_of(model, tmp_path, stream=stream, task_limit=limit, eval_dense=True, dtype=dtype, restart=stream)
    )
    more = [] if limit is None else ["--limit", str(limit)]
    arguments = f",dtype={dtype}"
    pruned = of_the_command(tmp_path / "pruned", tmp_path / "theirs", STOCK, *more, arguments=arguments)
    same_numbers(record["zero_shot"], pruned)
    same_numbers(
        record["zero_shot"], of_the_command(model, tmp_path / "dense", STOCK, *more, arguments=arguments), "dense"
    )
    accuracies = [pruned["results"][name]["acc,none"] for name in STOCK]
    assert record["zero_shot"]["mean"]["pruned"] == pytest.approx(sum(accuracies) / len(STOCK), abs=1e-12)
    assert record["zero_shot"]["harness"] == f"lm_eval {lm_eval.__version__}"
    assert len(set(accuracies)) > 1  # they are not all of one value


@pytest.mark.parametrize("bos_in_front", [True, False])
def test_bos_is_the_tokenizers_own_or_in_front_of_every_text(bos_in_front, hub, tmp_path):
    """--add_bos once is what the harness does of itself, every its add_bos_token=True."""
    model, tasks = save_model(tmp_path / "model", bos_in_front), ("arc_easy", "winogrande")
    language_model = LanguageModel(
        transformers.AutoModelForCausalLM.from_pretrained(model), transformers.AutoTokenizer.from_pretrained(model)
    )
    requests = [Instance("loglikelihood", {}, (text(i, 4), f" {text(i, 2)}"), i) for i in range(5)]
    own = HarnessModel(language_model, lambda length: 2).loglikelihood(requests)
    assert own == HFLM(str(model), batch_size=2, device="cpu").loglikelihood(requests)
    every = HarnessModel(language_model, lambda length: 2, bos=0).loglikelihood(requests)
    begun = [Instance("loglikelihood", {}, (f"<s>{a}", b), i) for i, (a, b) in enumerate(r.args for r in requests)]
    assert every == HFLM(str(model), batch_size=2, device="cpu").loglikelihood(begun)
    assert (own == every) == bos_in_front
    assert language_model.tokenizer.pad_token is None  # the harness gives its own copy one
    record = main.run(config_of(model, tmp_path, tasks=tasks, add_bos="every"))
    assert record["zero_shot"]["mean"]["tasks"] == list(tasks)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_log_likelihoods_are_those_of_the_models_own_forward(architecture, tmp_path):
    """Of requests of many lengths in batches of several, block by block and whole, against one at a time."""
    hf = tiny_model(architecture)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>")), eos_token="</s>"
    )
    generator = torch.Generator().manual_seed(1)
    requests = [
        (None, *torch.randint(3, 90, (n,), generator=generator).split([n - n // 3, n // 3])) for n in range(3, 24)
    ]
    requests = [(texts, context.tolist(), continuation.tolist()) for texts, context, continuation in requests]
    expected = []
    for _, context, continuation in requests:
        with torch.no_grad():
            logits = hf(torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        picked = logits[-len(continuation) :].gather(1, torch.tensor(continuation)[:, None])
        expected.append(float(picked.sum()))
    hf.save_pretrained(tmp_path)
    streamed = open_model(find_source(str(tmp_path)), "cpu", "float32", tokenizer)
    streamed.load_non_blocks()
    whole = LanguageModel(hf, tokenizer)
    for model, store in ((whole, None), (streamed, Store(tmp_path, 0)), (streamed, Store(tmp_path, 2**40))):
        seen = HarnessModel(model, lambda length: max(1, 60 // length), store=store)
        found = seen._loglikelihood_tokens(requests)
        assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4)


def test_a_streamed_model_is_passed_over_as_often_as_its_hidden_states_need(folder, tmp_path, monkeypatch):
    from lib import harness

    streamed = open_model(
        find_source(str(folder)), "cpu", "float32", transformers.AutoTokenizer.from_pretrained(folder)
    )
    streamed.load_non_blocks()
    requests = [Instance("loglikelihood", {}, (text(i, 3 + i), " river"), i) for i in range(12)]
    passes, own = [], harness.last_hidden_states
    monkeypatch.setattr(harness, "last_hidden_states", lambda *a, **k: passes.append(1) or own(*a, **k))
    once = HarnessModel(streamed, lambda length: 2, store=Store(tmp_path, 0)).loglikelihood(requests)
    assert len(passes) == 1
    monkeypatch.setattr(harness, "AT_LEAST", 2 * 2 * 30 * 32 * 4)
    again = HarnessModel(streamed, lambda length: 2, store=Store(tmp_path, 0)).loglikelihood(requests)
    assert len(passes) > 2
    assert once == again


OWN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metadata: {{version: 7}}
"""
CHOICES = "doc_to_choice: [river, stone]\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
ROLLING = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"
WRITES = "generation_kwargs: {max_gen_toks: 4, until: ['.']}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture
def own(tmp_path):
    """A folder of tasks of one's own, on a file."""
    place = tmp_path / "own"
    place.mkdir()
    rows = [{"question": text(i, 5 + 9 * i), "answer": "river" if i % 3 else "stone"} for i in range(7)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"mine": ("multiple_choice", CHOICES), "rolls": ("loglikelihood_rolling", ROLLING)}
    for name, (kind, more) in kinds.items():
        made = OWN.format(name=name, data=place / "data.jsonl", kind=kind, more=more)
        (place / f"{name}.yaml").write_text(made.replace("{{question}}", "") if name == "rolls" else made)
        if name == "rolls":
            (place / f"{name}.yaml").write_text(
                made.replace('"{{answer}}"', '"{{question}}"').replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
            )
    (tmp_path / "writes.yaml").write_text(
        OWN.format(name="writes", data=place / "data.jsonl", kind="generate_until", more=WRITES)
    )
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [arc_challenge, arc_easy]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return place


@pytest.mark.parametrize("stream", [False, True])
def test_tasks_of_ones_own_in_memory_and_streamed(stream, own, folder, tmp_path):
    record = main.run(config_of(folder, tmp_path, tasks=(str(own),), stream=stream, batch_size=None))
    assert list(record["zero_shot"]["tasks"]) == ["mine", "rolls"]
    assert record["zero_shot"]["mean"]["tasks"] == ["mine"]
    summary = results.summary(record)
    assert "  mean of 1 " in summary
    assert "(the mean of acc, as in the paper, and not of acc_norm)" in summary
    assert "rolls, word_perplexity" in summary
    lm = HFLM(str(tmp_path / "pruned"), batch_size=1, device="cpu")
    rows = [json.loads(line)["question"] for line in (own / "data.jsonl").read_text().splitlines()]
    sums = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (row,), i) for i, row in enumerate(rows)])
    bits = -sum(sums) / sum(len(row.encode()) for row in rows) / torch.tensor(2.0).log().item()
    assert record["zero_shot"]["tasks"]["rolls"]["pruned"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_a_task_that_has_the_model_write(own, folder, tmp_path):
    theirs = of_the_command(folder, tmp_path / "theirs", (str(tmp_path / "writes.yaml"),))
    record = main.run(config_of(folder, tmp_path, tasks=(str(tmp_path / "writes.yaml"),), sparsity_ratio=0.0))
    same_numbers(record["zero_shot"], theirs)
    for flag, change in (("--stream", {"stream": True}), ("--add_bos every", {"add_bos": "every"})):
        with pytest.raises(RunError, match=f"--tasks .*writes.*: has the model write, and {flag}"):
            main.run(config_of(folder, tmp_path, tasks=(str(tmp_path / "writes.yaml"),), **change))


def test_the_summary_shows_the_accuracy_that_the_mean_counts(own, folder, tmp_path, capsys):
    """Whichever metric a task names first; and nothing else is on stdout, where the harness says that it bootstraps."""
    more = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]"
    text = OWN.format(name="last", data=own / "data.jsonl", kind="loglikelihood", more=more)
    (tmp_path / "last.yaml").write_text(text)
    record = main.run(config_of(folder, tmp_path, tasks=(str(tmp_path / "last.yaml"),)))
    assert next(iter(record["zero_shot"]["tasks"]["last"]["pruned"])) == "perplexity"
    assert capsys.readouterr().out == ""
    found = record["zero_shot"]["tasks"]["last"]["pruned"]["acc"]
    row = next(line for line in results.summary(record).splitlines() if line.startswith("  last"))
    assert row.split()[:3] == ["last", "-", f"{found:.4f}"]


def test_attention_that_plans_for_each_length_is_left_out(own, folder, tmp_path, monkeypatch):
    seen, evaluated = set(), zero_shot._evaluated
    monkeypatch.setattr(
        zero_shot, "_evaluated",
        lambda *given: seen.add(torch.backends.cuda.cudnn_sdp_enabled()) or evaluated(*given),
    )  # fmt: skip
    main.run(config_of(folder, tmp_path, tasks=(str(own),)))
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_ranks_share_the_requests_and_all_have_the_results(own, folder, tmp_path):
    numbers = []
    for count in (1, 2, 8):  # eight for seven documents
        out = tmp_path / str(count)
        arguments = [
            "--model", str(folder), "--prune_method", "magnitude", "--sparsity_ratio", "0.5", "--device", "cpu",
            "--no-eval_wikitext", "--eval_zero_shot", "--tasks", str(own), "--save", str(out), "--cache_dir",
            str(tmp_path / "cache"), *(["--stream", "--save_model", str(out / "pruned")] if count == 2 else []),
        ]  # fmt: skip
        done = forking.run_ranks(count, "main.py", arguments)
        assert done.returncode == 0, done.stderr
        record = json.loads(next(out.rglob("run.json")).read_text())
        numbers.append({name: task["pruned"] for name, task in record["zero_shot"]["tasks"].items()})
    for other in numbers[1:]:
        assert other["mine"] == numbers[0]["mine"]
        for metric in ("word_perplexity", "bits_per_byte"):
            assert other["rolls"][metric] == pytest.approx(numbers[0]["rolls"][metric], rel=1e-5)


def test_a_group_counts_a_task_once(own, hub, folder, tmp_path):
    tasks = (str(own / "mine.yaml"), str(tmp_path / "both.yaml"), "arc_easy", "ai2_arc")
    record = main.run(config_of(folder, tmp_path, tasks=tasks))["zero_shot"]
    assert set(record["mean"]["tasks"]) >= {"arc_easy", "arc_challenge"}
    values = [record["tasks"][name]["pruned"]["acc"] for name in record["mean"]["tasks"]]
    assert record["mean"]["pruned"] == pytest.approx(sum(values) / len(values))
    assert len(record["mean"]["tasks"]) == len(set(record["mean"]["tasks"]))
    assert record["groups"]["both"]["pruned"]["acc"] > 0


def test_a_task_that_another_rank_lacks_is_left_out_with_its_groups(hub, tmp_path, monkeypatch):
    (tmp_path / "both.yaml").write_text("group: both\ntask: [arc_challenge, arc_easy]\n")
    monkeypatch.setattr(ranks, "all_gather", lambda mine: [mine, {"arc_easy": "a full disk"}])
    tasks = load_tasks([str(tmp_path / "both.yaml"), "piqa"], cache_dir=str(tmp_path))
    assert tasks.names == ["arc_challenge", "piqa"]
    assert tasks.loaded["groups"] == {}
    assert tasks.missing == {"arc_easy": "a full disk"}


def test_what_cannot_be_had_is_left_out_and_said(hub, folder, tmp_path):
    record = main.run(config_of(folder, tmp_path, tasks=("hellaswag", "piqa"), task_limit=2))
    assert list(record["zero_shot"]["tasks"]) == ["piqa"]
    assert "Rowan/hellaswag" in record["zero_shot"]["missing"]["hellaswag"]
    assert any("--tasks hellaswag: left out" in event["message"] for event in record["events"])
    assert "hellaswag: left out" in results.summary(record)


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ("arc_eazy", "'arc_eazy' is unknown; did you mean 'arc_easy'"),
        ("nothing/here.yaml", "nothing/here.yaml: no such file"),
        ("hellaswag", "none can be had: hellaswag: Dataset 'Rowan/hellaswag' doesn't exist on the Hub"),
        ("humaneval", "humaneval: runs programs that the model writes"),
        ("{tmp}/bad.yaml", "bad.yaml: while parsing"),
        ("{tmp}/included.yaml", "included.yaml: .*No such file"),
        ("{tmp}/nameless.yaml", "nameless.yaml: names no task"),
        ("{tmp}/misspelt.yaml", "none can be had: misspelt: .*outputtype"),
        ("{tmp}/group.yaml", "few: 'arc_eazy' is unknown; did you mean 'arc_easy'"),
        ("{tmp}/empty", "empty: holds no task"),
        ("{tmp}/badly", "bad.yaml: while parsing"),
    ],
)
def test_one_line_before_the_model(tasks, says, hub, folder, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("task: [mine\nother: {")
    (tmp_path / "included.yaml").write_text("include: nowhere.yaml\ntask: mine")
    (tmp_path / "nameless.yaml").write_text("doc_to_text: hello")
    (tmp_path / "misspelt.yaml").write_text("task: misspelt\noutputtype: multiple_choice")
    (tmp_path / "group.yaml").write_text("group: few\ntask: [arc_challenge, {group: inner, task: [arc_eazy]}]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "badly").mkdir()
    (tmp_path / "badly" / "bad.yaml").write_text("task: [mine\nother: {")
    monkeypatch.setattr(workspace, "load_model", lambda *a, **k: pytest.fail("the weights were read"))
    with pytest.raises(RunError, match=f"^--tasks.*{says}") as error:
        main.run(config_of(folder, tmp_path, tasks=(tasks.format(tmp=tmp_path),)))
    assert "Traceback" not in str(error.value)


def test_a_hub_that_is_not_there_is_named(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        RunError, match=r"none can be had: arc_easy, arc_challenge: http://127\.0\.0\.1:9 cannot be reached"
    ):
        main.run(config_of(folder, tmp_path, tasks=("arc_easy", "arc_challenge")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="arc_easy: HF_HUB_OFFLINE is set; it is not in the cache"):
        main.run(config_of(folder, tmp_path, tasks=("arc_easy",)))


def test_a_resumed_run_evaluates_the_dense_model_once(own, folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path, tasks=(str(own),), stream=True, eval_dense=True)
    asked, evaluate = [], zero_shot.evaluate

    def cut_short(*arguments, what, **options):
        asked.append(what)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, what=what, **options)

    monkeypatch.setattr(zero_shot, "evaluate", cut_short)
    with pytest.raises(KeyboardInterrupt):
        main.run(config)
    record = main.run(config)
    assert asked == ["zero-shot, dense", "zero-shot, pruned", "zero-shot, pruned"]
    assert record["zero_shot"]["tasks"]["mine"]["dense"]["acc"] >= 0


def test_a_broken_model_has_no_accuracy(own, folder, tmp_path):
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    hf.lm_head.weight.data[0, 0] = torch.inf
    model = LanguageModel(hf, transformers.AutoTokenizer.from_pretrained(folder))
    tasks = load_tasks([str(own)], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RunError, match="NaN or infinite"):
        zero_shot.evaluate(model, tasks, lambda length: 1)


def test_a_table_of_results_from_before_gets_the_columns(own, folder, tmp_path):
    (tmp_path / "results").mkdir()
    before = results.COLUMNS[:-2]
    (tmp_path / "results" / "results.tsv").write_text("\t".join(before) + "\n" + "\t".join("x" * len(before)) + "\n")
    record = main.run(config_of(folder, tmp_path, tasks=(str(own),)))
    with (tmp_path / "results" / "results.tsv").open() as file:
        old, new = csv.DictReader(file, delimiter="\t")
    assert (old["seconds"], old["accuracy"]) == ("x", "")
    assert float(new["accuracy"]) == record["zero_shot"]["mean"]["pruned"]
    assert new["accuracy_dense"] == ""


def test_the_harness_leaves_the_generators_where_they_were(own, folder, tmp_path):
    import random

    random.seed(5)
    before = random.getstate()
    main.run(config_of(folder, tmp_path, tasks=(str(own),)))
    assert random.getstate() == before


def test_a_tokenizer_without_bos_and_eos(folder, tmp_path):
    """The harness itself fails on it; its tokens are what the tokenizer gives."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    requests = [Instance("loglikelihood", {}, (text(i, 4), f" {text(i, 2)}"), i) for i in range(3)]
    found = [
        HarnessModel(LanguageModel(hf, one), lambda length: 1).loglikelihood(requests) for one in (tokenizer, bare)
    ]
    assert found[0] == found[1]
    rolling = HarnessModel(LanguageModel(hf, bare), lambda length: 1)
    rolling.loglikelihood_rolling(requests)
    assert "no BOS and no EOS" in rolling.failed[requests[0].task_name]


def write_task(place: Path, name: str, rows: list[dict], kind: str, more: str, **changes: str) -> str:
    """A task file on data of its own; `changes` replace lines of the definition."""
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = OWN.format(name=name, data=place / f"{name}.jsonl", kind=kind, more=more)
    for key, value in changes.items():
        made = "\n".join(f"{key}: {value}" if line.startswith(f"{key}:") else line for line in made.splitlines())
    (place / f"{name}.yaml").write_text(made + "\n")
    return str(place / f"{name}.yaml")


FUNCTIONS = """
def fail(doc, results):
    raise ZeroDivisionError("one answer of none")

def ratio(doc, results):
    return {"acc": 1 / results[0][0]}

def nothing(doc, results):
    return {}

def overflow(items):
    return 10.0 ** 400

def no_number(items):
    return {"a": 1}

def nan(items):
    return float("nan")
"""
OWN_METRIC = "process_results: !function functions.{}\nmetric_list: [{{metric: acc, {} higher_is_better: true}}]"
LONG = 'doc_to_choice: "{{[answer, question]}}"\nmetric_list: [{metric: acc}]'


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("long", "a continuation of 2401 tokens is longer than the model's window of 512"),
        ("long ratio", "a continuation of 2401 tokens is longer than the model's window of 512"),
        ("empty", "the model's tokenizer gives no token for a part of"),
        ("undefined", "'dict object' has no attribute"),
        ("fails", "one answer of none"),
        ("overflows", "OverflowError"),
        ("writes", "tokens"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_left_out(broken, says, own, folder, tmp_path):
    """Before the model, at its answers or after them; the others have their results, and what it is a part of none."""
    rows = [json.loads(line) for line in (own / "data.jsonl").read_text().splitlines()]
    (own / "functions.py").write_text(FUNCTIONS)
    kind, more, changes = "multiple_choice", CHOICES, {}
    if broken.startswith("long"):
        rows[3]["answer"], more, changes = "zq7 " * 600, LONG, {"doc_to_target": "0"}
    if broken == "long ratio":
        more = LONG.splitlines()[0] + "\n" + OWN_METRIC.format("ratio", "aggregation: mean,")
    elif broken == "empty":
        kind, more, changes = "loglikelihood", "metric_list: [{metric: acc}]", {"doc_to_text": '""'}
        rows[5]["answer"] = ""
    elif broken == "undefined":
        rows[4]["answer"], changes = {}, {"doc_to_text": '"{{answer.x.y}}"'}
        rows = [row | {"answer": {"x": {"y": "river"}}} if i != 4 else row for i, row in enumerate(rows)]
        changes["doc_to_target"] = "0"
    elif broken == "fails":
        more = CHOICES.splitlines()[0] + "\n" + OWN_METRIC.format("fail", "aggregation: mean,")
    elif broken == "overflows":
        more = CHOICES.splitlines()[0] + "\nmetric_list: "
        more += "[{metric: acc, aggregation: !function functions.overflow, higher_is_better: true}]"
    elif broken == "writes":
        kind, more = "generate_until", "generation_kwargs: {max_gen_toks: 900}\nmetric_list: [{metric: exact_match}]"
    bad = write_task(own, "bad", rows, kind, more, **changes)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [mine, bad]\naggregate_metric_list: [{metric: acc}]\n")
    tasks = (str(own / "mine.yaml"), bad, str(tmp_path / "both.yaml"))
    config = config_of(folder, tmp_path, tasks=tasks, eval_dense=True)
    record = main.run(config)["zero_shot"]
    assert says in record["missing"]["bad"]
    assert list(record["tasks"]) == ["mine"]
    assert not record["groups"]
    alone = main.run(config_of(folder, tmp_path / "alone", tasks=tasks[:1], eval_dense=True))["zero_shot"]
    assert record["tasks"] == alone["tasks"]


def test_what_the_model_raises_is_no_tasks_fault(own, folder, tmp_path, monkeypatch):
    from lib import harness

    monkeypatch.setattr(harness, "last_hidden_states", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.run(config_of(folder, tmp_path, tasks=(str(own),)))


def test_no_task_is_left(own, folder, tmp_path):
    rows = [{"question": "river", "answer": "zq7 " * 600}]
    bad = write_task(own, "bad", rows, "multiple_choice", LONG, doc_to_target="0")
    record = main.run(config_of(folder, tmp_path, tasks=(bad,), plot=True))
    assert record["zero_shot"]["mean"]["pruned"] is None
    assert "bad: left out" in results.summary(record)


@pytest.mark.parametrize("function", ["nothing", "no_number", "nan"])
def test_a_task_without_a_number(function, own, folder, tmp_path):
    (own / "functions.py").write_text(FUNCTIONS)
    rows = [{"question": "river", "answer": "stone"}] * 2
    more = CHOICES.splitlines()[0] + "\n"
    if function == "nothing":
        more += OWN_METRIC.format(function, "aggregation: mean,")
    else:
        more += f"metric_list: [{{metric: acc, aggregation: !function functions.{function}, higher_is_better: true}}]"
    bad = write_task(own, "bad", rows, "multiple_choice", more)
    record = main.run(config_of(folder, tmp_path, tasks=(str(own / "mine.yaml"), bad)))
    assert record["zero_shot"]["mean"]["tasks"] == ["mine"]
    assert "bad: gives no number" in results.summary(record)
    json.loads(json.dumps(record["zero_shot"], allow_nan=False))


def test_a_group_is_evaluated_as_far_as_its_data_go(own, folder, tmp_path):
    """Its members by name or in place, nested; without them it has no value of its own."""
    inline = (own / "mine.yaml").read_text().replace("task: mine", "task: inline").strip().replace("\n", "\n  ")
    gone = inline.replace("task: inline", "task: gone").replace("data.jsonl", "gone.jsonl")
    (own / "inner.yaml").write_text(f"group: inner\ntask:\n- {inline}\n- {gone}\n")
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [mine, inner]\naggregate_metric_list: [{metric: acc}]\n")
    record = main.run(config_of(folder, tmp_path, tasks=(str(own), str(tmp_path / "outer.yaml"))))["zero_shot"]
    assert set(record["tasks"]) == {"mine", "rolls", "inner::inline"}
    assert record["tasks"]["inner::inline"]["pruned"] == record["tasks"]["mine"]["pruned"]
    assert "gone.jsonl" in record["missing"]["gone"]
    assert not record["groups"]


def test_two_tasks_of_one_name_are_refused(own, folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.yaml").write_text((own / "mine.yaml").read_text().replace("answer", "question"))
    for tasks in ((str(own), str(tmp_path / "other")), (str(own / "mine.yaml"), str(tmp_path / "other" / "mine.yaml"))):
        with pytest.raises(RunError, match=r"^--tasks: .*mine.yaml and .*mine.yaml both define 'mine'; name one"):
            main.run(config_of(folder, tmp_path, tasks=tasks))
    twice = (str(own), f"{own / 'mine.yaml'},{own / 'rolls.yaml'}")
    assert list(main.run(config_of(folder, tmp_path, tasks=twice))["zero_shot"]["tasks"]) == ["mine", "rolls"]


def test_a_task_whose_data_come_while_a_run_is_broken_off(own, folder, tmp_path, monkeypatch):
    late = write_task(own, "late", [{"question": "river", "answer": "stone"}], "multiple_choice", CHOICES)
    data = (own / "late.jsonl").read_text()
    (own / "late.jsonl").unlink()
    config = config_of(folder, tmp_path, tasks=(str(own / "mine.yaml"), late), stream=True, eval_dense=True)
    with monkeypatch.context() as patch:
        accuracies = Evaluator._accuracies
        cut = lambda self, what: accuracies(self, what) if what == "dense" else (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        patch.setattr(Evaluator, "_accuracies", cut)
        with pytest.raises(KeyboardInterrupt):
            main.run(config)
    (own / "late.jsonl").write_text(data)
    record = main.run(config)["zero_shot"]
    assert all(record["tasks"][name][stage] for name in ("mine", "late") for stage in ("dense", "pruned"))
