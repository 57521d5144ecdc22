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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from .errors import RunError
from .model import LanguageModel, Matrix


class Shards:
    """The tensors of a checkpoint's safetensors files by the model parameters they become.

    Raises RunError where a file cannot be read and where a parameter inside a block is missing.
    """

    def __init__(self, model: nn.Module, files: Iterable[Path], name: str):
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

    def read(self, parameters: Iterable[str], device: torch.device) -> None:
        """Give the model's parameters of these names their values, on `device`, in the dtype they were built with."""
        sources = [source for parameter in parameters for source in self._sources.get(parameter, [])]
        with ExitStack() as stack:
            opened = {path: stack.enter_context(self._opened(path)) for path in {self._files[s] for s in sources}}
            tensors = {source: opened[self._files[source]].get_slice(source) for source in sources}
            options = LoadStateDictConfig(device_map={"": device}, weight_mapping=self._mapping)
            with _no_progress_bar():
                report, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        for parameter in parameters:
            module, _, key = parameter.rpartition(".")
            if self.model.get_submodule(module).get_parameter(key).is_meta or report.conversion_errors:
                raise RunError(
                    f"--model {self.name}: its weights do not fit its configuration: {parameter} is missing or of "
                    "another shape"
                )

    def drop(self, parameters: Iterable[str]) -> None:
        """Let go of the values of these parameters."""
        for parameter in parameters:
            module, _, key = parameter.rpartition(".")
            module = self.model.get_submodule(module)
            setattr(module, key, nn.Parameter(getattr(module, key).to("meta"), requires_grad=False))


class ShardedModel(LanguageModel):
    """A LanguageModel whose matrices have values only while they are `resident`."""

    def __init__(self, model: nn.Module, files: Iterable[Path], name: str, device: str = "cpu"):
        super().__init__(model, name=name)
        self._shards, self._device = Shards(model, files, name), torch.device(device)
        self._parameters = {id(module): prefix for prefix, module in model.named_modules()}

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def resident(self, matrices: list[Matrix]):
        names = list(dict.fromkeys(f"{self._parameters[id(m.module)]}.{m.parameter}" for m in matrices))
        self._shards.read(names, self._device)
        try:
            yield
        finally:
            self._shards.drop(names)


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
