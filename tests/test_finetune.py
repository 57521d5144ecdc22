"""Fine-tuning: what is trained is what is merged, no zero is filled, and a run that was broken off ends the same."""

import contextlib
import json
import random
import shlex
import shutil

import forking
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_bad_input import save_tokenizer
from tiny import ARCHITECTURES, tiny_model, tiny_tokens
from torch.nn import functional as F

import main
from lib import LanguageModel, RunError, cli, results, zero_shot
from lib.data import evaluation_windows, training_windows
from lib.evaluate import perplexity
from lib.finetune.config import FinetuneConfig
from lib.finetune.run import run
from lib.finetune.student import MaskedFull, MaskedLora, PlainLora
from lib.finetune.teacher import Teacher
from lib.finetune.zeros import ZeroMask
from lib.harness_tasks import load_tasks
from lib.load import find_source, load_model, load_tokenizer, open_model


def pruned(architecture: str, share: float = 0.6) -> LanguageModel:
    """A tiny model with `share` of its prunable weights zero."""
    model, generator = LanguageModel(tiny_model(architecture)), torch.Generator().manual_seed(0)
    for matrix in model.matrices:
        matrix.write(matrix.weight * (torch.rand(matrix.shape, generator=generator) > share))
    return model


def student_of(kind: str, model: LanguageModel, *rest, passes: torch.dtype = torch.float32):
    if kind == "lora":
        return MaskedLora(model, 4, 8.0, ("all",), passes, *rest)
    return MaskedFull(model, passes, *rest)


# ---------------------------------------------------------------- students


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_trained_is_what_is_merged_and_no_zero_is_filled(architecture, kind):
    model, tokens = pruned(architecture), tiny_tokens()
    zeros = ZeroMask(model)
    with torch.no_grad():
        before = model.forward_logits(tokens)
    student = student_of(kind, model)
    with torch.no_grad():
        torch.testing.assert_close(student.logits(tokens), before)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        student(tokens, torch.arange(len(tokens)))["loss"].backward()
        optimiser.step()
    with torch.no_grad():
        trained = student.logits(tokens)
        assert not torch.allclose(trained, before, atol=1e-3)
        student.finish()
        torch.testing.assert_close(model.forward_logits(tokens), trained)
    assert not zeros.filled(model)
    assert ZeroMask(model).digest == zeros.digest


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "dbrx"])
def test_passes_in_bfloat16_where_the_model_runs_in_them(architecture, kind):
    """Its zeros and its master weights are as ever; DBRX's own code adds up tensors of two types."""
    model, tokens = pruned(architecture), tiny_tokens()
    zeros = ZeroMask(model)
    exact = model.forward_logits(tokens).detach()
    student = student_of(kind, model, passes=torch.bfloat16)
    assert student.choose_precision(tokens[:1]) == (architecture != "dbrx")
    logits = student.logits(tokens).detach()
    assert (logits.dtype == torch.bfloat16) == (architecture != "dbrx")
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    student(tokens, torch.arange(6))["loss"].backward()
    assert {parameter.grad.dtype for parameter in student.trained().values()} == {torch.float32}
    student.finish()
    assert ZeroMask(model).digest == zeros.digest
    assert model.model.dtype == torch.float32


def test_every_matrix_is_updated():
    model = pruned("mixtral")
    before = {matrix.name: matrix.weight.clone() for matrix in model.matrices}
    student = student_of("lora", model)
    for update in student.updates:
        torch.nn.init.normal_(update.lora_B["default"].weight)
    student.finish()
    for matrix in model.matrices:
        changed = matrix.weight != before[matrix.name]
        assert torch.equal(changed, before[matrix.name] != 0)


def test_the_update_is_alpha_over_rank_times_the_product():
    model = pruned("llama")
    weight = model.matrices[0].weight.clone()
    student = student_of("lora", model)
    update = student.updates[0]
    torch.nn.init.normal_(update.lora_B["default"].weight)
    product = update.lora_B["default"].weight.detach() @ update.lora_A["default"].weight.detach()
    assert update.lora_A["default"].weight.shape[0] == 4
    student.finish()
    torch.testing.assert_close(model.matrices[0].weight, weight + 8 / 4 * product * (weight != 0))


def test_the_loss_and_its_gradient_are_those_of_transformers():
    """Of the survivors, with zeros taken as constants."""
    model, reference, tokens = pruned("llama"), pruned("llama").model.requires_grad_(True), tiny_tokens()
    wanted = reference(input_ids=tokens, labels=tokens).loss
    wanted.backward()
    student = student_of("full", model)
    loss = student(tokens, torch.arange(len(tokens)))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for (name, parameter), master in zip(reference.named_parameters(), student.masters, strict=True):
        dense = parameter.grad[parameter != 0] if "proj" in name else parameter.grad
        torch.testing.assert_close(master.grad, dense)


def test_the_optimiser_has_no_state_for_zeros():
    model = pruned("llama")
    left = sum(int(matrix.weight.count_nonzero()) for matrix in model.matrices)
    others = model.parameters - model.prunable_parameters
    student = student_of("full", model)
    assert sum(parameter.numel() for parameter in student.trained().values()) == left + others
    adam = torch.optim.Adam(student.parameters())
    student(tiny_tokens(), torch.arange(6))["loss"].backward()
    adam.step()
    assert sum(state["exp_avg"].numel() for state in adam.state.values()) == left + others


def test_weight_decay_leaves_norms_and_biases_alone():
    student = student_of("full", pruned("gpt2"))
    decayed = {id(parameter) for parameter in student.decayed()}
    for name, part in zip(dict(student.language_model.model.named_parameters()), student.masters, strict=True):
        assert (id(part) in decayed) == (name.endswith("weight") and "ln_" not in name), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_in_bfloat16_have_masters_in_float32(kind):
    model = LanguageModel(pruned("llama").model.bfloat16())
    zeros, tokens = ZeroMask(model), tiny_tokens()
    student = student_of(kind, model)
    assert {parameter.dtype for parameter in student.trained().values()} == {torch.float32}
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(2):  # the first moves B away from zero
        student(tokens, torch.arange(6))["loss"].backward()
        optimiser.step()
    student.finish()
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    assert not zeros.filled(model)


def test_what_is_tied_stays_tied():
    model = pruned("llama_tied")
    student = student_of("full", model)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    student(tiny_tokens(), torch.arange(6))["loss"].backward()
    optimiser.step()
    student.finish()
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_targets_by_name():
    student = MaskedLora(pruned("llama"), 4, 8.0, ("q_proj", "v_proj"), torch.float32)
    assert len(student.updates) == 2 * 3
    assert len(MaskedLora(pruned("llama"), 4, 8.0, ("q_proj", "all"), torch.float32).updates) == 7 * 3
    with pytest.raises(RunError, match=r"--lora_targets: .* no matrix called c_attn; it has q_proj, k_proj, v_proj"):
        MaskedLora(pruned("llama"), 4, 8.0, ("c_attn",), torch.float32)


def test_a_filled_zero_is_seen():
    model = pruned("gpt2")
    zeros, matrix = ZeroMask(model), model.matrices[2]
    row, column = (int(index[0]) for index in torch.nonzero(matrix.weight == 0, as_tuple=True))
    matrix.weight[row, column] = 1e-30
    assert zeros.filled(model) == {matrix.name: 1}
    assert ZeroMask(model).digest != zeros.digest


# ---------------------------------------------------------------- texts


def test_training_windows_share_nothing(tokenizer, tmp_path):
    text = "".join(random.Random(0).choices("abcdefgh", k=4000))
    (tmp_path / "a.txt").write_text(text)
    apart = evaluation_windows(str(tmp_path / "a.txt"), tokenizer, seqlen=50, limit=10)  # of the very same text
    train, held = training_windows(
        str(tmp_path / "a.txt"), tokenizer, nsamples=40, held_out=7, seqlen=50, seed=3, exclude=apart
    )
    assert (train.shape, held.shape) == ((40, 50), (7, 50))
    found = ["".join(tokenizer.convert_ids_to_tokens(window)) for window in torch.cat([apart, train, held])]
    places = [text.index(each) for each in found]
    assert sorted(places)[:10] == list(range(0, 500, 50))
    assert len({place // 50 for place in places}) == 57
    again, _ = training_windows(
        str(tmp_path / "a.txt"), tokenizer, nsamples=None, held_out=7, seqlen=50, seed=3, exclude=apart
    )
    assert len(again) == 4000 // 50 - 10 - 7
    assert torch.equal(again[:40], train)
    with pytest.raises(RunError, match=r"--data .*: has 70 windows of 50 tokens, beside 10 that hold text of --eval_d"):
        training_windows(str(tmp_path / "a.txt"), tokenizer, nsamples=64, held_out=7, seqlen=50, seed=3, exclude=apart)


def test_documents_of_c4_follow_each_other(tokenizer, tmp_path):
    """Short ones too, in random order, and no more than are needed."""
    texts = [f"<{i:03}>" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, held = training_windows(f"c4:{tmp_path / 'a.jsonl'}", tokenizer, nsamples=6, held_out=2, seqlen=20, seed=0)
    said = ["".join(tokenizer.convert_ids_to_tokens(window)) for window in torch.cat([train, held])]
    documents = [each[i : i + 5] for each in said for i in range(0, 20, 5)]
    assert set(documents) <= set(texts)
    assert len(set(documents)) == 32
    assert documents != sorted(documents)


# ---------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pruned models in folders of their own, the dense ones, and two texts."""
    here = tmp_path_factory.mktemp("finetune")
    for name, seed in (("train", 1), ("test", 2)):
        words = random.Random(seed)
        text = " ".join(f"w{min(62, int(words.expovariate(0.1)))}" for _ in range(1500))
        (here / f"{name}.txt").write_text(text)
    for architecture, more in (
        ("llama", "--sparsity_type 2:4"), ("gpt2", "--sparsity_ratio 0.6"), ("mixtral", "--sparsity_ratio 0.6"),
    ):  # fmt: skip
        tiny_model(architecture).save_pretrained(here / architecture)
        save_tokenizer(here / architecture)
        main.run(cli.parse(
            f"--model {here / architecture} --prune_method magnitude {more} --no-eval_wikitext --save {here / 'res'} "
            f"--save_model {here / architecture}_pruned --seqlen 16 --device cpu --cache_dir {here / 'cache'}".split()
        ))  # fmt: skip
    for name, changes in (("short", {"max_position_embeddings": 16}), ("wide", {"vocab_size": 120})):
        shutil.copytree(here / "llama", here / name)
        config = json.loads((here / name / "config.json").read_text())
        (here / name / "config.json").write_text(json.dumps(config | changes))
    few = tiny_model("llama")
    few.model.layers[0].mlp.up_proj.weight.data[0, :3] = 0  # as quantisation leaves some
    few.save_pretrained(here / "few")
    save_tokenizer(here / "few")
    return here


def flags(here, out, architecture: str = "llama", more: str = "") -> list[str]:
    return (
        f"--model {here / architecture}_pruned --data {here / 'train.txt'} --eval_data {here / 'test.txt'} --seqlen 16 "
        f"--validation_windows 8 --nsamples 64 --device cpu --dtype float32 --learning_rate 1e-2 "
        f"--save {out / 'results'} --cache_dir {out / 'cache'} --save_model {out / 'tuned'} {more}"
    ).split()


def tune(here, out, architecture: str = "llama", more: str = "") -> dict:
    return run(cli.parse(flags(here, out, architecture, more), FinetuneConfig))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_run(architecture, method, places, tmp_path):
    record = tune(places, tmp_path, architecture, f"--method {method}")
    assert record["loss"]["after"] < record["loss"]["before"]
    assert record["perplexity"]["after"] < record["perplexity"]["before"]
    assert record["sparsity"]["digest"]["before"] == record["sparsity"]["digest"]["after"]
    assert record["training"]["windows_a_step"] * record["training"]["steps"] == 64
    assert record["pruning"]["config"]["prune_method"] == "magnitude"
    before = load_file(places / f"{architecture}_pruned" / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    assert before.keys() == after.keys()
    inside = [name for name in before if any(part in name for part in ("layers.", ".h.")) and before[name].dim() > 1]
    for name in inside:
        assert not after[name][before[name] == 0].any(), name
    tokens = tiny_tokens()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert saved(tokens).logits.isfinite().all()
    assert json.loads((tmp_path / "tuned" / "alphapruning.json").read_text())["run"] == record["run"]
    assert not list(tmp_path.glob(".tuned*"))


def test_two_of_four_stay_two_of_four(places, tmp_path):
    tune(places, tmp_path, more="--method full")
    model = LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
    for matrix in model.matrices:
        assert (matrix.weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all(), matrix.name


def test_windows_are_as_long_as_the_calibrations(places, tmp_path):
    words = flags(places, tmp_path)
    del words[words.index("--seqlen") : words.index("--seqlen") + 2]
    assert run(cli.parse(words, FinetuneConfig))["training"]["seqlen"] == 16


def test_windows_of_a_second_fine_tuning_are_as_long_as_those_of_the_first(places, tmp_path):
    given = " ".join(flags(places, tmp_path / "first")).replace("--seqlen 16 ", "--seqlen 12 ")
    run(cli.parse(given.split(), FinetuneConfig))
    again = " ".join(flags(places, tmp_path, more=f"--model {tmp_path / 'first' / 'tuned'}"))
    record = run(cli.parse(again.replace("--seqlen 16 ", "").split(), FinetuneConfig))
    assert record["training"]["seqlen"] == 12


def test_the_perplexity_is_that_of_what_was_saved(places, tmp_path):
    record = tune(places, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    windows = evaluation_windows(str(places / "test.txt"), tokenizer, seqlen=16)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.double()
    assert record["perplexity"]["after"] == pytest.approx(float(loss.exp()), rel=1e-5)


TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: [w1, w2]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_accuracies_before_and_after_are_those_of_the_two_checkpoints(places, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"w{3 + i} w{5 * i % 7}", "answer": i % 2}) + "\n" for i in range(12))
    )
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    record = tune(places, tmp_path, more=f"--eval_zero_shot --tasks {tmp_path / 'mine.yaml'}")
    found, model = record["zero_shot"], find_source(str(places / "llama_pruned"))
    tokenizer = load_tokenizer(model)
    for stage, folder in (("before", model), ("after", find_source(str(tmp_path / "tuned")))):
        tasks = load_tasks([str(tmp_path / "mine.yaml")], cache_dir=str(tmp_path / "cache"))
        of_folder = zero_shot.evaluate(load_model(folder, "cpu", "float32", tokenizer), tasks, lambda _: 4)
        assert found["tasks"]["mine"][stage] == of_folder["tasks"]["mine"]
    assert "mean of 1" in results.finetuned_summary(record)
    assert "| mine |" in ModelCard.load(tmp_path / "tuned" / "README.md").text


def test_the_card_has_both_steps(places, tmp_path):
    record = tune(places, tmp_path)
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    steps = [line.strip() for line in card.text.splitlines() if line.startswith("    python ")]
    assert steps[0].startswith("python main.py --model")
    assert "--sparsity_type 2:4" in steps[0]
    again = cli.parse(shlex.split(steps[1])[2:], FinetuneConfig)
    assert again.run_name == record["run"]
    assert "| loss on text held out |" in card.text


def test_the_teacher_is_the_exact_divergence(places):
    """Read block by block, it gives what the whole model gives."""
    model, dense, tokens = pruned("llama"), tiny_model("llama"), tiny_tokens()
    streamed = open_model(find_source(str(places / "llama")), "cpu", "float32")
    streamed.load_non_blocks()
    student = student_of("full", model, Teacher(streamed, tokens, 2, None, 96), 0.25)
    loss = student(tokens[[4, 1]], torch.tensor([4, 1]))["loss"]
    with torch.no_grad():
        mine, wanted = (each(tokens[[4, 1]]).logits[:, :-1] for each in (pruned("llama").model, dense))
        p, q = wanted.softmax(-1).double(), mine.softmax(-1).double()
        divergence = (p * (p / q).log()).sum(-1).mean()
        plain = F.cross_entropy(mine.flatten(0, 1).double(), tokens[[4, 1]][:, 1:].flatten())
    torch.testing.assert_close(loss.detach().double(), 0.75 * plain + 0.25 * divergence, rtol=1e-5, atol=1e-6)


def test_a_run_with_a_teacher(places, tmp_path):
    record = tune(places, tmp_path, more=f"--teacher {places / 'llama'} --distill 0.9")
    assert record["sparsity"]["digest"]["before"] == record["sparsity"]["digest"]["after"]
    assert record["loss"]["after"] < record["loss"]["before"]


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_an_adapter_is_an_ordinary_one(architecture, places, tmp_path):
    from peft import PeftModel

    record = tune(places, tmp_path, architecture, "--keep_adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(places / f"{architecture}_pruned")
    model = PeftModel.from_pretrained(base, tmp_path / "tuned")
    windows = evaluation_windows(
        str(places / "test.txt"), transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned"), seqlen=16
    )
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.double()
    assert record["perplexity"]["after"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert any("merged into the pruned model it fills them" in event["message"] for event in record["events"])


def test_an_adapter_that_the_models_own_code_cannot_read_is_refused(places, tmp_path):
    """DBRX's experts take their weights out of a module that peft has wrapped."""
    pruned("dbrx").model.save_pretrained(places / "dbrx_pruned")
    save_tokenizer(places / "dbrx_pruned")
    with pytest.raises(RunError, match="--keep_adapter: peft makes no adapter of DbrxForCausalLM"):
        tune(places, tmp_path, "dbrx", "--keep_adapter")


def test_an_adapter_of_experts_alone():
    """gpt-oss keeps its stacks (in, out), which peft knows of itself."""
    targets = [pruned("gpt_oss").matrices[-1].name.split(".")[-2:]]
    names = [part for parts in targets for part in parts if not part.isdigit()]
    student = PlainLora(pruned("gpt_oss"), 4, 8.0, (names[-1],), torch.float32)
    assert student.trained()


@pytest.mark.parametrize(("method", "noted"), [("lora", False), ("full", True)])
def test_zeros_outside_the_prunable_matrices_are_said_to_be_trained(method, noted, places, tmp_path):
    model = pruned("llama").model
    model.lm_head.weight.data[:, :8] = 0
    model.save_pretrained(places / "head_pruned")
    save_tokenizer(places / "head_pruned")
    events = tune(places, tmp_path, "head", f"--method {method}")["events"]
    assert any("like other weights: lm_head.weight (25%)" in event["message"] for event in events) == noted
    saved = load_file(tmp_path / "tuned" / "model.safetensors")["lm_head.weight"]
    assert bool(saved[:, :8].any()) == noted


def test_without_any_evaluation(places, tmp_path):
    record = tune(places, tmp_path, more="--no-eval_wikitext --validation_windows 0 --optim adafactor")
    assert (record["loss"], record["perplexity"]) == (None, None)
    assert "share of zeros" in results.finetuned_summary(record)


# ---------------------------------------------------------------- broken off


def interrupted(monkeypatch, after: int):
    """Ctrl-C at the end of that step."""
    from lib.finetune import train

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(train._Log, "on_step_end", on_step_end)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_command_goes_on_and_ends_the_same(method, places, tmp_path, monkeypatch):
    more = f"--method {method} --save_steps 2"
    tune(places, tmp_path / "whole", more=more)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        interrupted(patch, after=5)
        tune(places, tmp_path / "parts", more=more)
    left = tmp_path / "parts" / ".tuned.training"
    assert [path.name for path in left.glob("checkpoint-*")] == ["checkpoint-4"]
    (left / "checkpoint-5").mkdir()  # as of a run killed while it wrote
    size = sum(path.stat().st_size for path in left.rglob("model.safetensors"))
    assert size < 80_000  # what is trained alone
    record = tune(places, tmp_path / "parts", more=more)
    assert record["training"]["steps"] == 8
    one, other = (load_file(tmp_path / part / "tuned" / "model.safetensors") for part in ("whole", "parts"))
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    assert not left.exists()


@pytest.mark.parametrize("more", ["--keep_adapter", ""])
def test_a_run_broken_off_once_its_result_is_saved_is_completed(more, places, tmp_path, monkeypatch):
    from lib.finetune import run as module

    measured = []

    def cut_short(*args, what, **options):
        measured.append(what)
        if what == "perplexity, after":
            raise KeyboardInterrupt
        return perplexity(*args, what=what, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "perplexity", cut_short)
        with pytest.raises(KeyboardInterrupt):
            tune(places, tmp_path, "gpt2", more)
    assert list((tmp_path / "tuned").iterdir())
    assert tune(places, tmp_path, "gpt2", more)["training"]["steps"] == 8


def test_another_run_does_not_go_on(places, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        interrupted(patch, after=3)
        tune(places, tmp_path, more="--save_steps 2")
    with pytest.raises(RunError, match=r"--save_model .*: --rank was 8 and is 4; --restart begins anew"):
        tune(places, tmp_path, more="--save_steps 2 --rank 4")
    assert tune(places, tmp_path, more="--save_steps 2 --rank 4 --restart")["training"]["steps"] == 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_diverges_leaves_nothing_to_go_on_from(method, places, tmp_path):
    with pytest.raises(RunError, match="lower --learning_rate"):
        tune(places, tmp_path, more=f"--method {method} --save_steps 2 --optim sgd --learning_rate 1e30")
    assert not list(tmp_path.glob(".tuned*"))
    assert tune(places, tmp_path, more=f"--method {method} --save_steps 2")["training"]["steps"] == 8


@pytest.mark.parametrize(
    ("targets", "what"), [("all", ".tuned.training"), ("q_proj", "tuned")], ids=["the state", "the checkpoint"]
)
def test_a_full_disk_is_one_line(targets, what, places, tmp_path):
    """Whatever of the two has no room; with room, the same command ends."""
    more = f"--quiet --lora_targets {targets} --save_steps 5"
    done = forking.run("script/finetune.py", flags(places, tmp_path, more=more), file_size=80_000)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "script/finetune.py: error: --save_model" in done.stderr
    assert f"{tmp_path / what} " in done.stderr.replace(":", " ")
    assert "cannot be written" in done.stderr
    assert not list((tmp_path / "tuned").iterdir())
    assert tune(places, tmp_path, more=more)["training"]["steps"] == 8


def test_ranks_share_the_windows_and_not_the_result(places, tmp_path):
    one = tune(places, tmp_path / "one", more=f"--teacher {places / 'llama'}")
    done = forking.run_ranks(2, "script/finetune.py", flags(
        places, tmp_path / "two", more=f"--gradient_accumulation 4 --teacher {places / 'llama'}"
    ))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps") == 1
    two = json.loads(next((tmp_path / "two").rglob("run.json")).read_text())
    assert two["environment"]["processes"] == 2
    assert two["training"]["windows_a_step"] == one["training"]["windows_a_step"]
    assert two["perplexity"]["after"] == pytest.approx(one["perplexity"]["after"], rel=1e-3)
    assert two["sparsity"]["digest"] == one["sparsity"]["digest"]


# ---------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--method qlora", "--method: 'qlora'"),
        ("--rank 0", "--rank 0: must be at least 1"),
        ("--alpha 0", "--alpha 0: must be above 0"),
        ("--learning_rate nan", "--learning_rate nan: must be above 0"),
        ("--alpha inf", "--alpha inf: must be above 0 and finite"),
        ("--weight_decay nan", "--weight_decay nan: must be at least 0"),
        ("--activation_memory inf", "--activation_memory inf: must be at least 0 and finite"),
        ("--optim adamw_tosh", "--optim: 'adamw_tosh' is unknown; did you mean 'adamw_torch'?"),
        ("--optim lomo", "--optim lomo: cannot be used here"),
        ("--distill 0.5", "--distill 0.5: needs --teacher"),
        ("--teacher {here}/llama --distill 1.5", "--distill 1.5: must lie in (0, 1]"),
        ("--teacher {here}/gone", "--teacher {here}/gone: neither a model's folder"),
        ("--method full --rank 4", "--rank: is of --method lora"),
        ("--data {here}/gone.txt", "--data {here}/gone.txt: no such file"),
        ("--data {here}/train.txt --nsamples 5000", "fewer than the 5008 of --nsamples and --validation_windows"),
        ("--save_model {here}/llama_pruned", "holds --model {here}/llama_pruned; name another folder"),
        ("--save_model {here}", "holds --model"),
        ("--model {here}/llama", "is dense: none of its"),
        ("--model {here}/few", "% of its "),
        ("--lora_targets qproj", "has no matrix called qproj"),
        ("--seqlen 100", "--seqlen 100: the model's limit is 64"),
        ("--teacher {here}/short --seqlen 32", "--teacher {here}/short: its window is 16 tokens; give --seqlen 16 or"),
        ("--teacher {here}/wide", "--teacher {here}/wide: has 120 tokens, and the model that learns has "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(more, says, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "set_up_logging", lambda quiet: transformers.logging.disable_progress_bar())
    given = flags(places, tmp_path, more=more.format(here=places))
    assert cli.main(lambda config: str(run(config)), given, FinetuneConfig) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("script/finetune.py: error: --")
    assert says.format(here=places) in err
    assert err.count("\n") == 1
