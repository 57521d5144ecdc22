"""Everything that is written: results, the metric cache, the pruned checkpoint. Nothing else writes files."""

import csv
import io
import json
import logging
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
import transformers
from safetensors import SafetensorError, safe_open

from .allocation import ALLOCATIONS
from .config import RunConfig
from .errors import RunError
from .metrics import METRICS
from .model import LanguageModel

log = logging.getLogger(__name__)

MARK = "alphapruning.json"  # in a checkpoint saved here: how it was made, and that it may be replaced
COLUMNS = (
    "run", "model", "method", "sparsity_type", "target", "achieved", "metric", "epsilon", "mapping_type", "seed",
    "dataset", "seqlen", "windows", "perplexity_dense", "perplexity", "seconds",
)  # fmt: skip


def prepare(config: RunConfig) -> None:
    """Make sure, before hours of work, that everything the run will write can be written."""
    _check_folder("--save", Path(config.save))
    if config.ww_metric_cache is not None:
        _check_folder("--WW_metric_cache", Path(config.ww_metric_cache))
    elif ALLOCATIONS[config.allocation].needs_scores:
        _check_folder("--cache_dir", Path(config.cache_dir))
    if config.save_model is not None:
        path = Path(config.save_model)
        others = {"--save": config.save, "--WW_metric_cache": config.ww_metric_cache, "--cache_dir": config.cache_dir}
        for flag, other in others.items():
            if other is not None and Path(other).resolve().is_relative_to(path.resolve()):
                raise RunError(
                    f"--save_model {path}: holds {flag} {other}, and a checkpoint replaces its folder; name another"
                )
        _check_folder("--save_model", path)
        if any(path.iterdir()) and not (path / MARK).is_file():
            raise RunError(
                f"--save_model {path}: holds files that are not a checkpoint of this tool; name another folder"
            )


def _check_folder(flag: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it. Raises RunError where the disk is full or does not let us."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- the run


def build_record(
    config: RunConfig,
    model: dict,
    layers: list[dict],
    perplexity: dict | None,
    seconds: dict[str, float],
    events: list[dict],
) -> dict:
    """The contents of run.json. `layers` holds {name, block, shape, score, target_sparsity, sparsity}."""
    by_block: dict[int, list[dict]] = {}
    for layer in layers:
        by_block.setdefault(layer["block"], []).append(layer)
    return {
        "run": config.run_name,
        "config": asdict(config),
        "model": model,
        "sparsity": {
            "target": config.sparsity,
            "achieved": _share_of_zeros(layers),
            "blocks": [_share_of_zeros(block) for block in by_block.values()],
        },
        "perplexity": perplexity,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "events": events,
        "environment": environment(model),
        "layers": layers,
    }


def _share_of_zeros(layers: list[dict]) -> float:
    sizes = [math.prod(layer["shape"]) for layer in layers]
    return sum(layer["sparsity"] * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)


def peak_memory() -> dict[str, int]:
    """Largest resident set of this process so far and, on cuda, the largest allocation of each device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks


def environment(model: dict) -> dict:
    """What the numbers were made with."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        revision = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": model["device"],
        "device_name": torch.cuda.get_device_name() if model["device"].startswith("cuda") else platform.processor(),
        "dtype": model["dtype"],
        "threads": torch.get_num_threads(),
        "git_revision": revision,
    }


def write_run(config: RunConfig, record: dict) -> Path:
    """Write run.json and layers.csv, and the published text file once there is a perplexity. Returns the folder."""
    folder = Path(config.save) / config.run_name
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["name", "block", "rows", "columns", "score", "target_sparsity", "sparsity"])
    for layer in record["layers"]:
        score = "" if layer["score"] is None else layer["score"]
        target, reached = layer["target_sparsity"], layer["sparsity"]
        rows.writerow([layer["name"], layer["block"], *layer["shape"], score, target, reached])
    write_text(folder / "layers.csv", table.getvalue())
    if record["perplexity"]:
        name = f"perplexity_{config.prune_method}_sparsity_{config.sparsity:g}.txt"
        achieved, pruned = record["sparsity"]["achieved"], record["perplexity"]["pruned"]
        header = "method\tactual_sparsity\tppl_test\n"
        write_text(folder / name, f"{header}{config.prune_method}\t{achieved:.4f}\t{pruned:.4f}\n")
    return folder


def append_result(config: RunConfig, record: dict) -> None:
    """One line for the run at the end of results.tsv."""
    path, perplexity = Path(config.save) / "results.tsv", record["perplexity"] or {}
    scored = any(layer["score"] is not None for layer in record["layers"])
    allocated = [config.ww_metric, config.epsilon, config.mapping_type]
    values = (
        record["run"], config.model, config.prune_method, config.sparsity_type, config.sparsity,
        f"{record['sparsity']['achieved']:.6f}", *(allocated if scored else ["", "", ""]), config.seed,
        *map(perplexity.get, ("dataset", "seqlen", "windows", "dense", "pruned")), f"{record['seconds']['total']:.1f}",
    )  # fmt: skip
    lines = "" if path.exists() else "\t".join(COLUMNS) + "\n"
    lines += "\t".join("" if value is None else str(value) for value in values) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def summary(record: dict) -> str:
    """The run as a small table for people."""
    model, sparsity, perplexity = record["model"], record["sparsity"], record["perplexity"]
    config, blocks = record["config"], record["sparsity"]["blocks"]
    lines = [
        "",
        f"{config['prune_method']} on {model['id']}: {sparsity['achieved']:.2%} of {model['prunable_parameters']:,} "
        f"prunable weights removed ({model['coverage']:.1%} of the model is prunable)",
        "",
        f"{'':28}{'dense':>10}{'pruned':>10}",
        f"{'share of zeros':28}{'':>10}{sparsity['achieved']:>10.4f}",
        f"{'  least pruned block':28}{'':>10}{min(blocks):>10.4f}",
        f"{'  most pruned block':28}{'':>10}{max(blocks):>10.4f}",
    ]
    if perplexity:
        dense = f"{perplexity['dense']:.3f}" if perplexity["dense"] else "-"
        name = f"perplexity, {Path(perplexity['dataset']).name}"
        lines.append(f"{name[:28]:28}{dense:>10}{perplexity['pruned']:>10.3f}")
        lines.append(f"{'  (lower is better)':28}")
    lines += ["", f"Results: {Path(config['save']) / record['run']}/ (run.json, layers.csv)"]
    if config["save_model"]:
        lines.append(f"Pruned model: {config['save_model']}/")
    return "\n".join(lines)


# ---------------------------------------------------------------- the metric cache


def metric_cache(config: RunConfig, model: LanguageModel) -> Path:
    """The folder of the run's metric values; where none is named, one of this model's own."""
    return Path(config.ww_metric_cache or Path(config.cache_dir) / "ww_metric" / model.digest[:16])


def read_metric(folder: Path, model: LanguageModel, metric: str, events: list[dict]) -> dict[str, float] | None:
    """Cached values of `metric` for each matrix of this very model, or None where there are none.

    A bare <metric>.npy in the published format (one float a matrix, in module order) is accepted with a warning.
    Raises RunError for a cache of another model and for one that cannot be read.
    """
    path, names = folder / f"{metric}.json", [matrix.name for matrix in model.matrices]
    if path.is_file():
        try:
            cache = json.loads(path.read_text(encoding="utf-8"))
            digest, version, values = cache["digest"], cache["version"], cache["values"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"--WW_metric_cache {folder}: {path.name} is not a metric cache; remove it") from error
        if digest != model.digest:
            other = cache.get("model", "?")
            raise RunError(
                f"--WW_metric_cache {folder}: {path.name} holds the values of another model or other weights "
                f"({other}); name another folder"
            )
        if version == METRICS[metric].version and list(values) == names:
            log.info("%s: read from %s", metric, path)
            return values
        return None  # made by an earlier definition of the metric
    path = folder / f"{metric}.npy"
    if not path.is_file():
        return None
    try:
        values = numpy.load(path, allow_pickle=False)
        if not isinstance(values, numpy.ndarray):
            raise ValueError("an archive")
    except (ValueError, OSError, EOFError) as error:
        raise RunError(f"--WW_metric_cache {folder}: {path.name} is not a plain array of numbers") from error
    if (
        values.shape != (len(names),)
        or not numpy.issubdtype(values.dtype, numpy.number)
        or not numpy.isfinite(values).all()
    ):
        raise RunError(
            f"--WW_metric_cache {folder}: {path.name} has shape {values.shape}, not {len(names)} finite numbers, "
            f"one for each prunable matrix of {model.name}"
        )
    message = f"{path} is used as it is: nothing in it says which model or metric its {len(names)} values belong to"
    log.warning(message)
    events.append({"matrix": None, "message": message})
    return dict(zip(names, values.tolist(), strict=True))


def write_metric(folder: Path, model: LanguageModel, metric: str, values: dict[str, float]) -> None:
    """Keep the values of `metric` for the next run of this model."""
    cache = {"metric": metric, "version": METRICS[metric].version, "model": model.name, "digest": model.digest}
    write_text(folder / f"{metric}.json", json.dumps({**cache, "values": values}, indent=1) + "\n")


# ---------------------------------------------------------------- the checkpoint


def save_checkpoint(model: LanguageModel, folder: str | Path, record: dict | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors, tokenizer, generation config), whole or not at all.

    It is read again before it takes its name: RunError where it does not hold the zeros that the model holds.
    `record` (run.json without the layers) is put beside it as alphapruning.json.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _make_savable(model.model.generation_config)
        model.model.save_pretrained(temporary)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        kept = {key: value for key, value in (record or {}).items() if key != "layers"}
        write_text(temporary / MARK, json.dumps(kept, indent=1) + "\n")
        written, held = _zeros_on_disk(temporary), _zeros_in_memory(model)
        if written != held:
            raise RunError(
                f"--save_model {folder}: holds {written} zeros where the model has {held}; is the disk sound?"
            )
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"--save_model {folder}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("checkpoint saved and read again: %s", folder)


def _make_savable(config: transformers.GenerationConfig | None) -> None:
    """transformers refuses to save what some models on the hub have: a temperature with sampling off."""
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        log.warning(
            "generation config: do_sample set, as it could not be saved otherwise (%s)", str(error).split("\n")[0]
        )
        config.do_sample = True


def _zeros_on_disk(folder: Path) -> int:
    """Zeros in all tensors of a folder's safetensors files, one tensor in memory at a time."""
    zeros = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(name)
                zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros


def _zeros_in_memory(model: LanguageModel) -> int:
    """Zeros in all tensors of the model's state, tied ones counted once."""
    tensors = {(t.data_ptr(), t.shape): t for t in model.model.state_dict().values()}
    return sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
