"""A student through transformers' Trainer: its settings, its log, and what it says when something goes wrong."""

import logging
import math
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from .. import ranks
from ..errors import RunError, reason_of
from ..load import choose_device
from ..progress import progress
from .config import FinetuneConfig
from .student import DivergedError, Student

log = logging.getLogger(__name__)

LOGGED = 0.05  # of the steps, from one line of the log to the next


def train(config: FinetuneConfig, student: Student, windows: Tensor, folder: Path, latest: Path | None) -> dict:
    """Train on windows (n, S); the `training` part of run.json. A run broken off goes on after `latest`.

    The order of the windows, and all else that is random, follows from --seed. Raises RunError for an optimiser that
    cannot be used here, and where the state of the run cannot be written into `folder`; DivergedError where the loss
    is no number any more.
    """
    data = [{"input_ids": window, "window": number} for number, window in enumerate(windows)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
        trainer = _Trainer(
            student,
            _arguments(config, folder, logging_steps=LOGGED, save_steps=config.save_steps),
            train_dataset=data,
        )
        trainer.accelerator.device_placement = False  # the model lies where it should
        for each in (PrinterCallback, ProgressCallback):  # what they say goes to stdout
            trainer.remove_callback(each)
        trainer.add_callback(_Log)
        done = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    return {
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "steps": done.global_step,
        "windows_a_step": config.batch_size * config.gradient_accumulation * ranks.world_size(),
        "parameters": sum(parameter.numel() for parameter in student.trained().values()),
        "losses": [
            {"step": line["step"], "loss": line["loss"], "learning_rate": line["learning_rate"]}
            for line in trainer.state.log_history
            if "loss" in line
        ],
    }


def check_optimiser(config: FinetuneConfig) -> None:
    """Try the optimiser on two numbers. Raises RunError where it cannot be used, such as without its package."""
    vector = nn.Parameter(torch.ones(2))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(_arguments(config, Path(config.save_model)), nn.Identity())
        optimiser = kind([vector], **options)
        vector.sum().backward()
        optimiser.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any package
        raise RunError(f"--optim {config.optim}: cannot be used here: {reason_of(error)[:300]}") from error


def _arguments(config: FinetuneConfig, folder: Path, **more) -> TrainingArguments:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation, learning_rate=config.learning_rate,
        weight_decay=config.weight_decay, num_train_epochs=config.epochs, optim=config.optim, seed=config.seed,
        use_cpu=_on_cpu(config), save_total_limit=1, save_strategy="steps", logging_strategy="steps", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, label_names=[], ddp_find_unused_parameters=True,
        dataloader_pin_memory=False, logging_nan_inf_filter=False, **more,
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # more processes, and not more threads, take more GPUs
    return arguments


def _on_cpu(config: FinetuneConfig) -> bool:
    return torch.device(choose_device(config.device)).type == "cpu"


class _Trainer(Trainer):
    def get_decay_parameter_names(self, model):
        decayed = {id(parameter) for parameter in self.model.decayed()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except torch.OutOfMemoryError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
            reason = getattr(error, "strerror", None) or reason_of(error)[:200]
            raise RunError(f"--save_model: {self.args.output_dir} cannot be written: {reason}") from error


class _Log(TrainerCallback):
    """The training in our log and under our bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = progress(None, "fine-tuning", "step", total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            if not math.isfinite(float(logs["loss"])):
                raise DivergedError(f"the loss is {logs['loss']} at step {state.global_step}; lower --learning_rate")
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2e",
                state.global_step, state.max_steps, float(logs["loss"]), float(logs["learning_rate"]),
            )  # fmt: skip
