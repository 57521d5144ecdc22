"""A checkpoint read tensor by tensor, without ever holding the model.

The model is built on the meta device, where parameters have shapes and no values; what is needed is read by name from
the files, converted as transformers itself converts it at loading (renamed, dequantised, fused into expert tensors,
cast), and dropped again.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from . import quantized
from .activations import Store
from .checkpoints import PLAIN, headers, opened
from .errors import RunError
from .memory import is_finite, trim_heap
from .model import LanguageModel, Matrix

ROWS_AT_ONCE = 4096  # of two embeddings that are compared


class Shards:
    """The tensors of a checkpoint's files by the model parameters they become; `quantizer` dequantises them.

    Raises RunError where a file cannot be read.
    """

    def __init__(self, model: nn.Module, files: Iterable[Path], name: str, quantizer=None):
        # Here and below: these take a second to import, and most errors come before a model is opened.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.model, self.name, self._quantizer = model, name, quantizer
        self._headers = headers(files, name)
        self._mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self._state = set(state)
        self._floats = {name: value.numel() for name, value in state.items() if value.is_floating_point()}
        self._sources: dict[str, list[str]] = defaultdict(list)  # parameter -> the tensors that it is made of
        self._parts: dict[str, list[str]] = {}  # tensor -> the parameters that are made of it
        self._shapes = {}  # tensor -> the shape of the parameter that it is, where nothing is done to it
        parameters = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
        for source in self._headers:
            target, matched = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
            converter = next((each for each in converters if matched in each.source_patterns), None)
            self._parts[source] = _all_targets(target, converter.target_patterns) if converter else [target]
            for part in self._parts[source]:
                self._sources[part if part in state else source].append(source)
            if matched is None and target in parameters:
                self._shapes[source] = parameters[target]

    def holds(self, name: str) -> bool:
        """Whether the files have what the parameter or buffer `name` is made of."""
        return name in self._sources

    def check(self, whole: bool = False) -> None:
        """Raises RunError for a parameter that the files hold in a code that nothing in the configuration explains,
        and with `whole` for one that they lack. Reads no value.
        """
        names = defaultdict(list)  # of what is tied or shared, of which the files may hold any
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        for source, shape in self._shapes.items():
            if self._headers[source].dtype is not None and self._headers[source].shape != shape:
                raise RunError(
                    f"--model {self.name}: its weights do not fit its configuration: {source} is "
                    f"{list(self._headers[source].shape)} in its files and {list(shape)} in the model"
                )
        for name, parameter in self.model.named_parameters():
            coded = [source for source in self._sources.get(name, []) if self._headers[source].coded]
            if parameter.is_floating_point() and coded and not self._scaled(name):
                raise self._unexplained(coded[0])
            if any(map(self.holds, names[id(parameter)])):
                continue
            module = f"{name.rpartition('.')[0]}."
            for source, header in self._headers.items():
                if header.coded and source.startswith(module):
                    raise self._unexplained(source)
            if whole:
                raise RunError(
                    f"--model {self.name}: its weights do not fit its configuration: {name} is missing from its files"
                )

    def _scaled(self, name: str) -> bool:
        """Whether what the parameter's coded tensors stand for can be told."""
        scales = [source for source in self._sources[name] if re.search(r"(?<!activation_)(?<!input_)q?scale", source)]
        floats = {s for s in self._sources[name] if self._headers[s].stored.lower().startswith(("f8", "float8"))}
        return self._quantizer is not None and len(scales) >= max(1, len(floats - set(scales)))

    def _unexplained(self, source: str) -> RunError:
        why = "nothing in its config.json says how to read them"
        if self._quantizer is not None:
            method = self._quantizer.quantization_config.quant_method
            method = getattr(method, "value", method)
            why = f"its files lack the scales that go with the method in its config.json ({method})"
        return RunError(
            f"--model {self.name}: its weights are quantised ({source} is {self._headers[source].stored}), and {why}; "
            "give the model that they were made from"
        )

    def separate(self, tied: dict[str, str]) -> list[str]:
        """Those of `tied` (parameter -> the one it is tied to) that the files hold with values of their own."""
        return [
            target
            for target, source in tied.items()
            if self.holds(target) and self.holds(source) and not self._equal(target, source)
        ]

    def _equal(self, one: str, other: str) -> bool:
        a, b = self._sources[one][0], self._sources[other][0]
        if self._headers[a].shape != self._headers[b].shape:
            return False
        with opened(self._headers[a].file, self.name) as first, opened(self._headers[b].file, self.name) as second:
            a, b, rows = first.get_slice(a), second.get_slice(b), self._headers[a].shape[0]
            parts = (slice(i, i + ROWS_AT_ONCE) for i in range(0, rows, ROWS_AT_ONCE))
            return all(torch.equal(a[part], b[part]) for part in parts)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every parameter and buffer of floats in the files; of what is quantised there that of the rest.

        Where all is quantised, the configuration's, or else bfloat16.
        """
        found, sizes = {}, Counter()
        for name, numel in self._floats.items():
            own = [self._headers[source].dtype for source in self._sources.get(name, [])]
            if own and None not in own:
                found[name] = functools.reduce(torch.promote_types, own)
                sizes[found[name]] += numel
        config = self.model.config.dtype
        fallback = config if isinstance(config, torch.dtype) and config in PLAIN.values() else torch.bfloat16
        most = sizes.most_common(1)[0][0] if sizes else fallback
        return dict.fromkeys(self._floats, most) | found

    def read(self, names: Iterable[str], device: torch.device) -> None:
        """Give the model's parameters and buffers of these names their values, on `device`, in the dtype they were
        built with. Raises RunError for one that is missing, of another shape, or holds NaN or infinity.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = list(names)
        sources = [source for name in names for source in self._sources.get(name, [])]
        split = {part for source in sources for part in self._parts[source]}.difference(names)
        unasked = [name for name in split.intersection(self._state) if _get(self.model, name).is_meta]
        with ExitStack() as stack:
            paths = {self._headers[source].file for source in sources}
            files = {path: stack.enter_context(opened(path, self.name)) for path in paths}
            tensors = {source: files[self._headers[source].file].get_slice(source) for source in sources}
            options = LoadStateDictConfig(
                device_map={"": device}, weight_mapping=self._mapping, hf_quantizer=self._quantizer
            )
            with _no_progress_bar():
                report, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        self.drop(unasked)
        if self._quantizer is not None:
            quantized.forget(self.model)
        for name in names:
            value = _get(self.model, name)
            if report.conversion_errors:
                reason = next(iter(report.conversion_errors.values())).strip().splitlines()[-1]
                raise RunError(f"--model {self.name}: its weights cannot be converted for {name}: {reason[:300]}")
            if value.is_meta:
                raise RunError(
                    f"--model {self.name}: its weights do not fit its configuration: {name} is missing or of "
                    "another shape"
                )
            if value.is_floating_point() and not is_finite(value):
                raise RunError(f"--model {self.name}: {name} holds NaN or infinity")
            value.requires_grad_(False)

    def drop(self, names: Iterable[str]) -> None:
        """Let go of the values of these parameters and buffers."""
        for name in names:
            path, _, key = name.rpartition(".")
            module, value = self.model.get_submodule(path), _get(self.model, name).to("meta")
            setattr(module, key, value if key in module._buffers else nn.Parameter(value, requires_grad=False))


def _all_targets(target: str, patterns: list[str]) -> list[str]:
    """The names of all that a converter makes, of which `target` is one."""
    found = next((pattern for pattern in patterns if pattern in target), None)
    if found is None:
        return [target]
    before, _, after = target.partition(found)
    return [before + pattern + after for pattern in patterns]


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, value)


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    return getattr(model.get_submodule(path), key)


class ShardedModel(LanguageModel):
    """A LanguageModel whose blocks have values only while they are resident.

    What is not in a block (embeddings, norms, head) has none before `load_non_blocks`. Blocks that were pruned and
    written elsewhere are read from there once `replace` says so.
    """

    streamed = True

    def __init__(self, shards: Shards, device: str = "cpu", tokenizer=None):
        model, name = shards.model, shards.name
        for target in shards.separate(model.all_tied_weights_keys or {}):  # transformers does not tie these either
            del model.all_tied_weights_keys[target]
            shards.drop([target])
        super().__init__(model, tokenizer, name)
        self._device = torch.device(device)
        self._shards = shards
        self._replaced: dict[int, Shards] = {}  # block -> where it is read from instead
        self._held: set[str] = set()  # what keeps its values for good
        self._trial_values: dict[str, torch.Tensor] = {}  # parameter of a changed block -> its value for now
        self._paths = {id(module): path for path, module in model.named_modules()}
        state = list(model.state_dict())
        inside = [tuple(name for name in state if name.startswith(f"{block}.")) for block in self.block_names]
        self._inside = dict(enumerate(map(list, inside)))
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        # What several modules share has several names, of which the files may hold any.
        self._aliases = {name: found for found in names.values() if len(found) > 1 for name in found}
        blocks = {name: index for index, held in self._inside.items() for name in held}
        self._last_block = {name: max(blocks.get(n, -1) for n in self._names(name)) for name in blocks}
        self._non_block_names = sorted({*state}.difference(*inside), key=state.index)

    @property
    def device(self) -> torch.device:
        return self._device

    def load_non_blocks(self) -> None:
        """Read everything outside the blocks, to stay. Raises RunError where the files lack anything of the model, and
        where a block shares any of what is outside.
        """
        outside = {alias: name for name in self._non_block_names for alias in self._names(name)}
        if shared := next((name for name in self._last_block if name in outside), None):
            raise RunError(
                f"--stream: {shared} is also {outside[shared]}, outside the blocks, and cannot come and go with its "
                "block; leave out --stream"
            )
        self._shards.check(whole=True)
        tied, held = self.model.all_tied_weights_keys or {}, self._shards.holds
        follow = {target if held(source) else source for target, source in tied.items()}  # get their value by the tie
        # One by one: what is read of a file counts as memory until the file is closed.
        for name in self._non_block_names:
            if name not in follow:
                self._shards.read([name], self._device)
        self.model.tie_weights(missing_keys=set(follow), recompute_mapping=False)
        for module in self.model.modules():  # of buffers that no checkpoint holds, such as rotary frequencies
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self._device)

    def _names(self, name: str) -> list[str]:
        """All names of what is called `name`."""
        return self._aliases.get(name, [name])

    def block_state(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a resident block by name, without those that a later block shares; each once."""
        tied = self.model.all_tied_weights_keys or {}
        found = {name: _get(self.model, name) for name in self._inside[index] if self._last_block[name] == index}
        return {tied.get(name, self._names(name)[0]): value for name, value in found.items()}

    def replace(self, blocks: Iterable[int], files: Iterable[Path]) -> None:
        """From now on read these blocks from other files."""
        self._replaced |= dict.fromkeys(blocks, Shards(self.model, files, self.name))

    def _place(self, name: str, pruned_upto: int | None) -> tuple[Shards, str]:
        """Where what is called `name` is read from, and its name there."""
        last = self._last_block[name]
        replaced = None if pruned_upto is not None and last > pruned_upto else self._replaced.get(last)
        for shards in filter(None, (replaced, self._shards)):
            for alias in self._names(name):
                if shards.holds(alias):
                    return shards, alias
        return self._shards, name

    @contextmanager
    def _resident(self, names: list[str], pruned_upto: int | None = None):
        places = {name: self._place(name, pruned_upto) for name in names if name not in self._held}
        try:
            for shards in {shards for shards, _ in places.values()}:
                shards.read(dict.fromkeys(alias for where, alias in places.values() if where is shards), self._device)
            for name, (_, alias) in places.items():
                _set(self.model, name, _get(self.model, alias))
                if pruned_upto is None and alias in self._trial_values:
                    _get(self.model, alias).copy_(self._trial_values[alias])
            yield
        finally:
            self._shards.drop({*places, *(alias for _, alias in places.values())} - self._held)
            for name in places:  # one still, though mostly without values
                for alias in self._names(name):
                    _set(self.model, alias, _get(self.model, name))
            trim_heap()

    @contextmanager
    def resident(self, matrices: list[Matrix]):
        names = dict.fromkeys(f"{self._paths[id(m.module)]}.{m.parameter}" for m in matrices)
        with self._resident(list(names)):
            yield

    @contextmanager
    def resident_block(self, index: int, pruned_upto: int | None = None):
        with self._resident(self._inside[index], pruned_upto):
            yield

    @contextmanager
    def restored(self, store: Store | None = None):
        def changed(index: int, *_) -> None:
            last = {self._names(name)[0] for name in self._inside[index] if self._last_block[name] == index}
            for name in last:
                value = _get(self.model, name)
                self._trial_values |= dict.fromkeys(self._names(name), store.copy(value) if store else value.clone())

        try:
            yield changed
        finally:
            self._trial_values = {}

    def keep_resident(self, names: Iterable[str]) -> None:
        for name in names:
            value = _get(self.model, name)
            own = value.detach().clone()  # and no view of a file, all of which would count as memory
            own = nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
            for alias in self._names(name):
                _set(self.model, alias, own)
                self._held.add(alias)

    @contextmanager
    def resident_in_forward(self, index: int):
        held = ExitStack()

        def enter(*_):
            with torch.autocast(self._device.type, enabled=False):  # what is read is the same whatever the pass is in
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
