"""Where a model comes from, and loading it: the hub, a local folder, a GGUF file or a known name."""

import copy
import difflib
import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights

from . import generation, hub, quantized, ranks, tokens
from .checkpoints import ADAPTER, WEIGHTS, read_index
from .errors import RunError, reason_of
from .gguf_files import forget_header, read_once, warn_of_old_transformers
from .known_models import KNOWN_MODELS, find_gguf
from .model import LanguageModel
from .placement import device_map_options
from .shards import ShardedModel, Shards

VOCABULARIES = ("*token*", "vocab*", "*.model", "tekken.json")  # the names of files that make a tokenizer
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `path` is a local folder, `gguf` a file inside it; `snapshot` is of the hub."""

    name: str
    path: str
    gguf: str | None
    cache_dir: str
    trust_remote_code: bool
    snapshot: hub.Snapshot | None = None

    @property
    def revision(self) -> str | None:
        """The commit that was fetched, of a model on the hub."""
        return self.snapshot and self.snapshot.commit

    @property
    def options(self) -> dict:
        """Keyword arguments that every from_pretrained of this source takes."""
        options = {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def find_source(name: str, cache_dir: str = "llm_weights", trust_remote_code: bool = False) -> Source:
    """Locate a model by hub name, local folder, GGUF file, or a name of KNOWN_MODELS. Reads no weight.

    Of a model on the hub the configuration and the tokenizer are fetched. Raises RunError where a path does not exist,
    a known model's package is missing, or the hub does not give it.
    """
    if trust_remote_code:
        hub.set_code_cache(cache_dir)
    file = locate(name, cache_dir)
    if file is None:
        repository = hub.Repository(name, "model", cache_dir, f"--model {name}")
        try:
            snapshot = hub.fetch_model(repository, code=trust_remote_code)
        except RunError as error:
            if near := difflib.get_close_matches(name, KNOWN_MODELS, n=1):
                raise RunError(f"{error}; did you mean '{near[0]}'?") from error
            raise
        if adapter := next(filter(snapshot.names.__contains__, ADAPTER), None):
            raise _is_adapter(name, adapter)
        return Source(name, str(snapshot.folder), None, cache_dir, trust_remote_code, snapshot)
    if file.is_dir():
        return Source(name, name, None, cache_dir, trust_remote_code)
    return Source(name, str(file.parent), file.name, cache_dir, trust_remote_code)


def _is_adapter(name: str, file: str) -> RunError:
    return RunError(
        f"--model {name}: holds an adapter ({file}); merge it into its model first, with the package peft: "
        "PeftModel.from_pretrained(model, folder_of_the_adapter).merge_and_unload().save_pretrained(folder), and give "
        "that folder; to prune the model without the adapter, give a folder without the adapter's files"
    )


def locate(name: str, cache_dir: str) -> Path | None:
    """The local folder or GGUF file that --model names; None for a name on the hub, which is not asked.

    Raises RunError as find_source does.
    """
    path = Path(name)
    if name in KNOWN_MODELS:
        return find_gguf(name, Path(cache_dir))
    if name.endswith(".gguf"):
        if not path.is_file():
            raise RunError(f"--model {name}: no such file")
        return path
    if path.is_dir():
        if adapter := next(filter(Path.is_file, map(path.joinpath, ADAPTER)), None):
            raise _is_adapter(name, adapter.name)
        if not (path / "config.json").is_file():
            raise RunError(f"--model {name}: the folder has no config.json; give one saved by save_pretrained")
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RunError(f"--model {name}: neither a model's folder, a .gguf file nor a name on the hub")
    return None


def _from_pretrained(auto_class, source: Source, what: str, **options):
    """auto_class.from_pretrained of the source; a failure to find or to read it is one line."""
    reading = read_once() if source.gguf else nullcontext()
    try:
        with hub.offline(), reading:  # what is needed of the hub was fetched
            return auto_class.from_pretrained(source.path, **source.options, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub client have no common base class
        reason = reason_of(error)
        if "trust_remote_code" in reason:
            raise RunError(
                f"--model {source.name}: brings code of its own; allow it with --trust_remote_code"
            ) from error
        raise RunError(f"--model {source.name}: its {what} cannot be loaded: {reason}") from error


def load_config(source: Source):
    """The model's configuration, read once (a GGUF file takes seconds); where the weights are quantised, one that has
    them dequantised. Raises RunError for what is no causal LM, for an adapter, and for weights whose quantisation
    cannot be undone.
    """
    file = Path(source.path) / (source.gguf or "config.json")
    return _read_config(source, file.stat().st_mtime_ns if file.is_file() else None)


@functools.cache
def _read_config(source: Source, _changed: int | None):
    config = _from_pretrained(transformers.AutoConfig, source, "configuration")
    _check_causal(source, config)
    return config if source.gguf else quantized.dequantizing(config, source.name)


def _check_causal(source: Source, config) -> None:
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    made = "".join(f", made for {name}" for name in (getattr(config, "architectures", None) or [])[:1])
    if config.is_encoder_decoder:
        raise RunError(
            f"--model {source.name}: an encoder-decoder ({type(config).__name__}{made}); only causal LMs are pruned"
        )
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunError(
            f"--model {source.name}: no causal LM to transformers' AutoModelForCausalLM "
            f"({type(config).__name__}{made}); only causal LMs are pruned"
        )


def load_tokenizer(source: Source):
    """The model's tokenizer, with the tokens of the published protocols."""
    if not source.gguf and not any(any(Path(source.path).glob(like)) for like in VOCABULARIES):
        # transformers would say that a package is missing
        raise RunError(f"--model {source.name}: its tokenizer is missing: it has no {', '.join(VOCABULARIES)}")
    if source.gguf:
        warn_of_old_transformers()
    return _from_pretrained(tokens.AutoTokenizer, source, "tokenizer", config=load_config(source))


def choose_device(device: str) -> str:
    """`auto` is cuda where there is one, else cpu. Raises RunError for a device that is not there."""
    device = str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and ranks.world_size() > 1:
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
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise RunError(f"--dtype: '{dtype}' is unknown; choose {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float16


def load_model(
    source: Source,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer=None,
    save_dtype: str = "auto",
    *,
    held_tokens: int = 0,
    beside: tuple[int, int] = (0, 0),
) -> LanguageModel:
    """Load a causal LM, ready for pruning. With `cuda` and several GPUs its blocks are spread over them where it does
    not fit on one beside the hidden states of `held_tokens` tokens and what the run holds `beside` its prunable weights
    (RunConfig.beside_weights, lib/placement.py).

    It is saved in the dtypes that it has in its files, or in `save_dtype`; what a GGUF file holds in float32.
    """
    device = choose_device(device)
    config = load_config(source)
    options = {"dtype": choose_dtype(dtype, device, config.dtype), "config": copy.deepcopy(config)}
    shards = None if source.gguf else _shards(source, options["dtype"])
    if shards:
        shards.check(whole=True)
    if device == "cuda" and torch.cuda.device_count() > 1:
        empty = shards.model if shards else _empty(source, options["dtype"])
        options |= device_map_options(LanguageModel(empty), held_tokens, beside)
    elif device != "cpu" or quantized.is_quantized(config):  # a quantiser would choose a device of its own
        options["device_map"] = {"": device}
    # Without these two, what a checkpoint lacks is made up at random and only a log line says so.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    # One of its own, as a bad one in the folder would end the loading.
    options["generation_config"] = transformers.GenerationConfig()
    model, report = _from_pretrained(transformers.AutoModelForCausalLM, source, "weights", **options)
    forget_header()  # no file is read again
    if wrong := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise RunError(
            f"--model {source.name}: its weights do not fit its configuration: {wrong[0]} is missing or of another "
            f"shape ({len(wrong)} such)"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RunError(f"--model {source.name}: does not fit on the GPUs of this machine; try --device cpu")
    if quantized.is_quantized(config) or source.gguf:
        quantized.forget(model)
    if shards:
        _fill_buffers(model, shards.model)
    return _furnished(LanguageModel(model, tokenizer, name=source.name), source, shards, save_dtype)


def _make_buffers(model: torch.nn.Module) -> None:
    """Buffers as transformers makes them at loading: once more, outside of what builds the model in its own dtype. The
    parameters have no values that this could touch.
    """
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    model.initialize_weights()


def _fill_buffers(model: torch.nn.Module, made: torch.nn.Module) -> None:
    """Give the model's buffers that no file holds the values that its own code makes: transformers leaves them to the
    model's `_init_weights`, which in code that comes with a model is often silent about them.
    """
    saved = model.state_dict().keys()
    own = dict(made.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved and name in own and not own[name].is_meta and own[name].shape == buffer.shape:
            buffer.copy_(own[name])


def open_model(
    source: Source, device: str = "auto", dtype: str = "float32", tokenizer=None, save_dtype: str = "auto"
) -> ShardedModel:
    """A causal LM whose blocks are read from its weight files when their turn comes; nothing is loaded yet.

    Raises RunError for a GGUF file, which is not read in parts.
    """
    if source.gguf:
        raise RunError(f"--model {source.name}: a GGUF file has no safetensors to read from")
    device = choose_device(device)
    shards = _shards(source, choose_dtype(dtype, device, load_config(source).dtype))
    return _furnished(ShardedModel(shards, device, tokenizer), source, shards, save_dtype)


def _empty(source: Source, dtype: torch.dtype) -> torch.nn.Module:
    """The model without values."""
    config = copy.deepcopy(load_config(source))
    try:
        with init_empty_weights():
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # whatever a model's own code makes of settings that do not go together
        reason = reason_of(error)
        raise RunError(
            f"--model {source.name}: its configuration describes no model that can be built: {reason[:300]}"
        ) from error


def _shards(source: Source, dtype: torch.dtype) -> Shards:
    """What the files of the model hold, known to fit it, and the model without values."""
    files, model = weight_files(source), _empty(source, dtype)
    _make_buffers(model)
    shards = Shards(model, files, source.name, quantized.prepare(model, copy.deepcopy(load_config(source))))
    model.tie_weights()
    shards.check()
    return shards


def _furnished(model: LanguageModel, source: Source, shards: Shards | None, save_dtype: str) -> LanguageModel:
    """The model with what is saved beside its weights, and with the dtypes in which they are saved."""
    inner = model.model
    dtypes = shards.dtypes() if shards else dict.fromkeys(inner.state_dict(), torch.float32)
    model.save_dtypes = dtypes if save_dtype == "auto" else dict.fromkeys(dtypes, getattr(torch, save_dtype))
    tied = getattr(inner.config, "tie_word_embeddings", False)
    if tied and inner._tied_weights_keys and not inner.all_tied_weights_keys:
        model.notes.append("tied by its configuration, with a head of its own in its files: that one is used and saved")
        inner.config.tie_word_embeddings = False
    file = None if source.gguf else optional_file(source, "generation_config.json")
    inner.generation_config, why = generation.read(inner.generation_config, file)
    if why:
        model.notes.append(why)
    return model


def optional_file(source: Source, file: str) -> Path | None:
    """A file beside the weights; None where the model has no such file."""
    path = Path(source.path) / file
    return path if path.is_file() else None


def weight_files(source: Source) -> list[Path]:
    """The files that transformers reads the weights from, fetched if need be: of the first kind that is there.

    Raises RunError where there is none, and for one that an index names and that is not there.
    """
    if source.snapshot:
        hub.fetch_weights(source.snapshot)
    folder, named = Path(source.path), getattr(load_config(source), "transformers_weights", None)
    for name in filter(functools.partial(optional_file, source), [named] if named else WEIGHTS):
        if not name.endswith(".index.json"):
            return [folder / name]
        index, shards = read_index(folder / name, f"--model {source.name}")
        files = {folder / shard for shard in shards}
        if not isinstance(index.get("metadata"), dict):
            raise RunError(
                f"--model {source.name}: {name} has no metadata, without which transformers does not read it; "
                'write "metadata": {} into it'
            )
        kind = Path(name.removesuffix(".index.json")).suffix
        if alien := sorted(file.name for file in files if file.suffix != kind):
            raise RunError(f"--model {source.name}: {name} names {alien[0]}, which is no {kind} file")
        if absent := sorted(file.name for file in files if not file.exists()):
            raise RunError(f"--model {source.name}: {name} names {absent[0]}, which is not there")
        return sorted(files)
    instead = ""
    for like, right in (("*.safetensors", WEIGHTS[0]), ("*.bin", WEIGHTS[2]), ("*.gguf", None)):
        if others := sorted(filter(Path.is_file, folder.glob(like))):
            remedy = f"call the file {right} if it holds them" if right else "to prune that, give its path"
            instead = f", but {others[0].name}; {remedy}"
            break
    raise RunError(f"--model {source.name}: has no weights: none of {', '.join(WEIGHTS)}{instead}")


def context_length(config) -> int | None:
    """The longest window the model was made for, where its configuration says."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    limits = (getattr(config, name, None) for name in names)
    return next((limit for limit in limits if limit and limit > 0), None)  # -1 of XLNet's is none
