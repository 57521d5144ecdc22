"""What a fine-tuning leaves behind, and where it goes on from when it was broken off."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from .. import ranks
from ..flags import Flags
from .card import finetuned_card
from .checkpoint import RECORD_FILE, without_layers
from .files import atomic_folder, check_folder, remove, write_text
from .journal import Resumable
from .run import accuracy_lines, check_checkpoint_folder, environment, peak_memory, run_folder
from .tokenizer import save_tokenizer

log = logging.getLogger(__name__)

STATE = "trainer_state.json"  # which the Trainer writes last of what is in a checkpoint of its own


def prepare_finetuning(config: Flags) -> None:
    """Make sure, before the work, that everything it will write can be written."""
    check_folder("--save", Path(config.save))
    check_folder("--save_model", Path(config.save_model).resolve().parent)
    check_checkpoint_folder(config.save_model, {"--save": config.save, "--cache_dir": config.cache_dir})


class TrainingState(Resumable):
    """The state of a fine-tuning: the Trainer's checkpoints, in a hidden folder beside --save_model.

    folder  where they lie
    latest  the last that is whole, to go on from; None at the beginning
    """

    def __init__(self, config: Flags, digest: str):
        target = Path(config.save_model).resolve()
        self.folder = target.with_name(f".{target.name}.training")
        super().__init__(self.folder, config, digest)
        if config.restart:
            remove(self.folder)
        ranks.barrier()
        latest = ranks.from_main(self._find)
        self.latest = latest and Path(latest)
        if latest:
            log.info("resuming after %s", self.latest)

    def _find(self) -> str | None:
        self._compare(self.folder / "header.json", "--save_model", self.folder)
        check_folder("--save_model", self.folder)
        write_text(self.folder / "header.json", json.dumps(self._header, indent=1) + "\n")
        found = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        whole = [path for path in found if _is_whole(path / STATE)]
        for path in found:
            if path not in whole[-1:]:
                shutil.rmtree(path)
        return str(whole[-1]) if whole else None

    def close(self) -> None:
        """The run is complete: remove the state."""
        ranks.barrier()
        remove(self.folder)


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def pruning_record(folder: str | Path) -> dict | None:
    """How the checkpoint in a folder was made, where it was made here: run.json without its layers."""
    try:
        record = json.loads((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = record.get("config") if isinstance(record, dict) and "run" in record else None
    return record if isinstance(config, dict) and isinstance(config.get("model"), str) else None


def finetuned_record(config: Flags, model: dict, layers: list[dict], seconds: dict, events: list[dict], **rest) -> dict:
    """The contents of run.json of a fine-tuning; `rest` are its parts pruning, sparsity, training, loss, perplexity and
    zero_shot.
    """
    return {
        "run": config.run_name,
        "config": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()},
        "model": model,
        **rest,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "events": events,
        "environment": environment(model),
        "layers": layers,
    }


def write_finetuned(config: Flags, record: dict) -> Path:
    """Write run.json, and with the checkpoint the record and a card with all the steps that it was made in."""
    folder = run_folder(config)
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    write_text(Path(config.save_model) / RECORD_FILE, json.dumps(without_layers(record), indent=1) + "\n")
    write_text(Path(config.save_model) / "README.md", finetuned_card(config, record))
    return folder


def save_adapter(adapted, tokenizer, base: str, folder: str | Path) -> None:
    """Write an adapter of peft (a PeftModel) for the model `base`, whole or not at all; on the first rank."""
    folder = Path(folder).resolve()
    if not ranks.is_main():
        return
    with atomic_folder("--save_model", folder) as temporary:
        for each in adapted.peft_config.values():
            each.base_model_name_or_path = base
        adapted.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        write_text(temporary / RECORD_FILE, "{}\n")
    log.info("adapter saved: %s", folder)


def finetuned_summary(record: dict) -> str:
    """The fine-tuning as a small table for people."""
    config, sparsity, training = record["config"], record["sparsity"], record["training"]
    lines = [
        "",
        f"{config['method']} on {record['model']['id']}: {training['steps']} steps, "
        f"{training['parameters']:,} numbers trained; {sparsity['before']:.2%} of "
        f"{record['model']['prunable_parameters']:,} prunable weights are zero, {sparsity['after']:.2%} after",
        "",
        f"{'':34}{'before':>10}{'after':>10}",
        f"{'share of zeros':34}{sparsity['before']:>10.4f}{sparsity['after']:>10.4f}",
    ]
    if loss := record["loss"]:
        lines.append(f"{'loss on text held out':34}{loss['before']:>10.4f}{loss['after']:>10.4f}")
    if perplexity := record["perplexity"]:
        name = f"perplexity, {Path(perplexity['dataset']).name}"
        lines.append(f"{name[:34]:34}{perplexity['before']:>10.3f}{perplexity['after']:>10.3f}")
    lines.append(f"{'  (lower is better)':34}")
    if record["zero_shot"]:
        lines += accuracy_lines(record["zero_shot"])
    lines += ["", f"Results: {Path(config['save']) / record['run']}/ (run.json)"]
    lines.append(f"{'Adapter' if config['keep_adapter'] else 'Fine-tuned model'}: {config['save_model']}/")
    return "\n".join(lines)
