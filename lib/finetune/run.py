"""A whole fine-tuning: flags -> pruned model -> student -> trained weights -> perplexity -> results."""

import logging
import math

import torch
from torch import Tensor

from .. import ranks, results, zero_shot
from ..activations import Store
from ..analysis import describe, note
from ..blockwise import BlockwiseError
from ..data import evaluation_windows, training_windows
from ..errors import RunError
from ..evaluate import perplexity, sparsity_by_matrix
from ..inputs import read_tasks
from ..load import Source, context_length, find_source, load_config, load_model, load_tokenizer, open_model
from ..masks import Pattern
from ..model import LanguageModel
from ..stopwatch import Stopwatch
from .config import FinetuneConfig
from .student import DivergedError, MaskedFull, MaskedLora, PlainLora, Student
from .teacher import Teacher, teacher_errors
from .zeros import ZeroMask

log = logging.getLogger(__name__)

DENSE = 0.01  # a share of zeros below which nobody can have pruned a model: quantisation alone leaves some
FEW_ZEROS = 0.05  # and one that a model may have which nobody pruned


def run(config: FinetuneConfig) -> dict:
    """From flags to results; returns the contents of run.json.

    Raises lib.errors.RunError for whatever the user can put right.
    """
    clock, events = Stopwatch(), []
    results.prepare_finetuning(config)
    with clock("load"):
        source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        pruning = results.pruning_record(source.path)
        architecture = load_config(source)
        seqlen = config.window(context_length(architecture), _recorded_length(pruning) or 2048)
        tokenizer = load_tokenizer(source)
        teacher_source = _find_teacher(config, architecture, tokenizer, seqlen)
        windows, validation, evaluation = _texts(config, tokenizer, seqlen)
        tasks = read_tasks(config, tokenizer, events)
        from .train import check_optimiser, train  # the Trainer takes seconds to import

        check_optimiser(config)
        model = load_model(source, config.device, config.held(architecture.dtype), tokenizer, config.save_dtype)
        model.check(Pattern(), windows, validation, evaluation)
        described = describe(model, events, source)
        zeros = _zeros(model, events)
        if config.method == "full":
            _note_other_zeros(model, events)
    batch = config.evaluation_batch(seqlen)

    def measure(what: str) -> dict:
        """What is known of the model as it is now; of what was not asked for, None."""

        def of(name: str, tokens: Tensor | None) -> float | None:
            return None if tokens is None else perplexity(model, tokens, batch_size=batch, what=f"{name}, {what}")

        with clock("evaluate"):
            held_out, found = of("text held out", validation), of("perplexity", evaluation)
        with clock("zero-shot"):
            rest = {"what": f"zero-shot, {what}"}
            accuracies = tasks and zero_shot.evaluate(model, tasks, config.evaluation_batch, **rest)
        return {"loss": held_out and math.log(held_out), "perplexity": found, "accuracies": accuracies}

    state = results.TrainingState(config, described["digest"])
    before = state.cached(f"before{f' {tasks.digest}' if tasks else ''}", lambda: measure("before"))
    log.info("before: %s", _said(before))
    with clock("teacher"):
        teacher = teacher_source and _teach(config, teacher_source, tokenizer, model, windows, batch, state)
    with clock("train"):
        student = _student(config, model, teacher)
        if not student.choose_precision(windows[:1]):
            note(events, f"{described['class']} does not run in mixed precision: passes are in its own type")
        model.model.train()
        try:
            training = train(config, student, windows, state.folder, state.latest)
            model.model.eval().requires_grad_(False)
            student.finish()
            _check_trained(model, zeros)
        except DivergedError:
            state.close()
            raise

    if config.keep_adapter:
        results.save_adapter(student.adapter[0], tokenizer, source.name, config.save_model)
        note(events, "the adapter knows of no zeros: merged into the pruned model it fills them")
    else:
        results.save_checkpoint(model, config.save_model)
    after, left = measure("after"), ZeroMask(model)
    log.info("after: %s", _said(after))
    if before["loss"] is not None and not after["loss"] < before["loss"]:
        note(events, "the loss on text held out did not fall: a lower --learning_rate or fewer --epochs may do better")
    if left.count > zeros.count:
        note(events, f"{left.count - zeros.count} weights became zero in training or in the dtype of the checkpoint")
    total, reached = model.prunable_parameters, sparsity_by_matrix(model)
    record = results.finetuned_record(
        config, described,
        [
            {"name": m.name, "block": m.block, "shape": list(m.shape), "sparsity": reached[m.name]}
            for m in model.matrices
        ],
        clock.seconds(), events,
        pruning=pruning,
        sparsity={
            "before": zeros.count / total, "after": left.count / total,
            "digest": {"before": zeros.digest, "after": left.digest},
        },
        training=training,
        zero_shot=tasks and zero_shot.record(tasks, before=before["accuracies"], after=after["accuracies"]),
        loss=_pair(before, after, "loss", {"windows": config.validation_windows}),
        perplexity=_pair(before, after, "perplexity", {
            "dataset": config.eval_data, "split": "evaluation", "seqlen": seqlen,
            "windows": 0 if evaluation is None else len(evaluation),
        }),
    )  # fmt: skip
    log.info("results: %s", results.write_finetuned(config, record))
    state.close()
    return record


def _recorded_length(pruning: dict | None) -> int | None:
    """Tokens a window of what the checkpoint was made with last: its fine-tuning, or the calibration."""
    last = (pruning or {}).get("training") or (pruning or {}).get("config") or {}
    return last.get("seqlen")


def _texts(config: FinetuneConfig, tokenizer, seqlen: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Windows to train on, windows of that text held out, and windows of the text evaluated on, as far as they are
    asked for; they share nothing.
    """
    common = {"seqlen": seqlen, "add_bos": config.add_bos, "cache_dir": config.cache_dir}
    evaluation = None
    if config.eval_wikitext:
        evaluation = evaluation_windows(config.eval_data, tokenizer, limit=config.eval_windows, **common)
        ranks.check_enough(f"--eval_windows {len(evaluation)}", evaluation)
    windows, validation = training_windows(
        config.data, tokenizer, nsamples=config.nsamples, held_out=config.validation_windows, seed=config.seed,
        exclude=evaluation, **common,
    )  # fmt: skip
    ranks.check_enough(f"--nsamples {len(windows)}", windows)
    if not config.validation_windows:
        return windows, None, evaluation
    ranks.check_enough(f"--validation_windows {config.validation_windows}", validation)
    return windows, validation, evaluation


def _zeros(model: LanguageModel, events: list[dict]) -> ZeroMask:
    """The model's zeros. Raises RunError where there are none to keep."""
    zeros = ZeroMask(model)
    share = zeros.count / model.prunable_parameters
    if share < DENSE:
        found = f"only {share:.2%}" if zeros.count else "none"
        raise RunError(
            f"--model {model.name}: is dense: {found} of its {model.prunable_parameters} prunable weights is zero; "
            "prune it first, or fine-tune it with peft or the Trainer themselves"
        )
    if share < FEW_ZEROS:
        note(events, f"only {share:.2%} of the prunable weights are zero: was the model pruned?")
    return zeros


def _note_other_zeros(model: LanguageModel, events: list[dict]) -> None:
    """Note the zeros of what is no prunable matrix, such as a head that another tool has pruned: they are trained."""
    prunable, filled = {id(matrix.stored) for matrix in model.matrices}, []
    for name, parameter in model.model.named_parameters():
        if id(parameter) not in prunable and parameter.dim() > 1:
            share = 1 - int(parameter.count_nonzero()) / parameter.numel()
            if FEW_ZEROS < share < 1:  # one that is all zeros begins so
                filled.append(f"{name} ({share:.0%})")
    if filled:
        note(events, f"zeros outside the prunable matrices are trained like other weights: {', '.join(filled)}")


def _find_teacher(config: FinetuneConfig, student, tokenizer, seqlen: int) -> Source | None:
    """Where the teacher comes from. Raises RunError where its tokens are not those of the student, whose configuration
    is given, or its window is shorter than `seqlen`.
    """
    if config.teacher is None:
        return None
    with teacher_errors(config.teacher):
        source = find_source(config.teacher, config.cache_dir, config.trust_remote_code)
        own, its = load_tokenizer(source), load_config(source)
    if (limit := context_length(its)) and limit < seqlen:
        raise RunError(f"--teacher {config.teacher}: its window is {limit} tokens; give --seqlen {limit} or less")
    sizes = [getattr(each.get_text_config(), "vocab_size", None) for each in (its, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise RunError(f"--teacher {config.teacher}: has {sizes[0]} tokens, and the model that learns has {sizes[1]}")
    if own.get_vocab() != tokenizer.get_vocab():
        raise RunError(f"--teacher {config.teacher}: has another vocabulary than --model {config.model}")
    return source


def _teach(
    config: FinetuneConfig, source: Source, tokenizer, student: LanguageModel, windows: Tensor, batch: int, state
) -> Teacher:
    limit = None if config.activation_memory is None else int(config.activation_memory * 1e9)
    rest = (windows, batch, Store(state.folder, limit), student.model.get_output_embeddings().weight.shape[0])
    with teacher_errors(config.teacher):
        source = results.convert_to_safetensors(source)
        held = config.held(load_config(source).dtype)
        try:
            teacher = open_model(source, config.device, held, tokenizer)
            teacher.load_non_blocks()
            return Teacher(teacher, *rest)
        except BlockwiseError:
            log.info("the teacher's blocks cannot be called one by one: it is loaded whole")
            return Teacher(load_model(source, config.device, held, tokenizer), *rest)


def _student(config: FinetuneConfig, model: LanguageModel, teacher: Teacher | None) -> Student:
    torch.manual_seed(config.seed)
    rest = (config.passes, teacher, config.share)
    if config.method == "full":
        return MaskedFull(model, *rest)
    kind = PlainLora if config.keep_adapter else MaskedLora
    return kind(model, config.rank, config.alpha, config.lora_targets, *rest)


def _check_trained(model: LanguageModel, zeros: ZeroMask) -> None:
    """Raises DivergedError for weights that are none any more; a zero that was filled is a bug."""
    for matrix in model.matrices:
        if not matrix.weight.isfinite().all():
            raise DivergedError(f"{matrix.name}: holds NaN or infinity after fine-tuning; lower --learning_rate")
    if filled := zeros.filled(model):
        raise AssertionError(f"zeros were filled: {filled}")


def _pair(before: dict, after: dict, key: str, about: dict) -> dict | None:
    return None if before[key] is None else {**about, "before": before[key], "after": after[key]}


def _said(measured: dict) -> str:
    found = {"loss": measured["loss"], "perplexity": measured["perplexity"]}
    if measured["accuracies"]:
        found["mean accuracy"] = zero_shot.mean(measured["accuracies"])
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None) or "not measured"
