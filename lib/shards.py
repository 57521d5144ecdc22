"""A safetensors checkpoint read tensor by tensor, without ever holding the model.

The model is built on the meta device, where parameters have shapes and no values; what is needed is read by name from
the files, converted as transformers itself converts it at loading (renamed, fused into expert tensors, cast), and
dropped again.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from .errors import RunError
from .model import LanguageModel, Matrix


class Shards:
    """The tensors of a checkpoint's safetensors files by the model parameters they become.

    Raises RunError where a file cannot be read and where a parameter inside a block is missing.
    """

    def __init__(self, model: nn.Module, files: Iterable[Path], name: str):
        # Here and below: these take a second to import, and most errors come before a model is opened.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.model, self.name = model, name
        self._files: dict[str, Path] = {}  # tensor name in the checkpoint -> its file
        for path in files:
            with self._opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
        self._mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self._sources: dict[str, list[str]] = defaultdict(list)  # parameter -> the tensors that it is made of
        for source in self._files:
            target, _ = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
            self._sources[target if target in state else source].append(source)

    @contextmanager
    def _opened(self, path: Path):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise RunError(f"--model {self.name}: {path.name} cannot be read: {error}") from error

    def read(self, names: Iterable[str], device: torch.device) -> None:
        """Give the model's parameters and buffers of these names their values, on `device`, in the dtype they were
        built with. Raises RunError for one that is missing, of another shape, or holds NaN or infinity.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = list(names)
        sources = [source for name in names for source in self._sources.get(name, [])]
        with ExitStack() as stack:
            opened = {path: stack.enter_context(self._opened(path)) for path in {self._files[s] for s in sources}}
            tensors = {source: opened[self._files[source]].get_slice(source) for source in sources}
            options = LoadStateDictConfig(device_map={"": device}, weight_mapping=self._mapping)
            with _no_progress_bar():
                report, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        for name in names:
            value = _get(self.model, name)
            if value.is_meta or report.conversion_errors:
                raise RunError(
                    f"--model {self.name}: its weights do not fit its configuration: {name} is missing or of "
                    "another shape"
                )
            if value.is_floating_point() and not value.isfinite().all():
                raise RunError(f"--model {self.name}: {name} holds NaN or infinity")
            value.requires_grad_(False)

    def drop(self, names: Iterable[str]) -> None:
        """Let go of the values of these parameters and buffers."""
        for name in names:
            path, _, key = name.rpartition(".")
            module, value = self.model.get_submodule(path), _get(self.model, name).to("meta")
            setattr(module, key, value if key in module._buffers else nn.Parameter(value, requires_grad=False))


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    return getattr(model.get_submodule(path), key)


class ShardedModel(LanguageModel):
    """A LanguageModel whose blocks have values only while they are resident.

    What is not in a block (embeddings, norms, head) has none before `load_rest`. Blocks that were pruned and written
    elsewhere are read from there once `replace` says so.
    """

    streamed = True

    def __init__(self, model: nn.Module, files: Iterable[Path], name: str, device: str = "cpu", tokenizer=None):
        super().__init__(model, tokenizer, name)
        self._device = torch.device(device)
        self._shards = Shards(model, files, name)
        self._replaced: dict[int, Shards] = {}  # block -> where it is read from instead
        self._paths = {id(module): path for path, module in model.named_modules()}
        state = list(model.state_dict())
        inside = [tuple(name for name in state if name.startswith(f"{block}.")) for block in self.block_names]
        self._inside = dict(enumerate(map(list, inside)))
        self._rest = sorted({*state}.difference(*inside), key=state.index)

    @property
    def device(self) -> torch.device:
        return self._device

    def load_rest(self) -> None:
        """Read everything outside the blocks, to stay."""
        tied = set(self.model.all_tied_weights_keys or {})
        self._shards.read([name for name in self._rest if name not in tied], self._device)
        self.model.tie_weights()
        for module in self.model.modules():  # of buffers that no checkpoint holds, such as rotary frequencies
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self._device)

    def rest(self) -> dict[str, torch.Tensor]:
        """The tensors outside the blocks, each tied one once."""
        tied = set(self.model.all_tied_weights_keys or {})
        return {name: _get(self.model, name) for name in self._rest if name not in tied}

    def block_state(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a resident block by name."""
        return {name: _get(self.model, name) for name in self._inside[index]}

    def replace(self, blocks: Iterable[int], files: Iterable[Path]) -> None:
        """From now on read these blocks from other files."""
        self._replaced |= dict.fromkeys(blocks, Shards(self.model, files, self.name))

    @contextmanager
    def _resident(self, block: int, names: list[str], original: bool = False):
        shards = self._shards if original else self._replaced.get(block, self._shards)
        shards.read(names, self._device)
        try:
            yield
        finally:
            self._shards.drop(names)

    @contextmanager
    def resident(self, matrices: list[Matrix]):
        names = dict.fromkeys(f"{self._paths[id(m.module)]}.{m.parameter}" for m in matrices)
        with self._resident(matrices[0].block, list(names)):
            yield

    @contextmanager
    def resident_block(self, index: int, original: bool = False):
        with self._resident(index, self._inside[index], original):
            yield

    @contextmanager
    def resident_in_forward(self, index: int):
        held = ExitStack()

        def enter(*_):
            held.enter_context(self.resident_block(index))

        with ExitStack() as stack:
            stack.callback(self.blocks[index].register_forward_pre_hook(enter).remove)
            stack.callback(self.blocks[index].register_forward_hook(lambda *_: held.close()).remove)
            stack.callback(held.close)
            yield


@contextmanager
def _no_progress_bar():
    """transformers shows a bar for every load, and here there is one a matrix."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
