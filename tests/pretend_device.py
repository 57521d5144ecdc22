"""GPUs for a machine that has none: tensors that claim to lie on `cuda:N`, are computed on the CPU and refuse to mix.

    with pretended_gpus(2) as gpus:
        x = torch.ones(3, device="cuda:1")
        x + torch.ones(3)       # raises, as on a GPU
        x.sum().item()          # gpus.waits[("lib/....py:12", "item")] += 1

What claims a device is a tensor's storage, so that views share it and nothing outlives it. Two modes keep the claims:
one sees torch's Python functions (`.device`, `.to`, `device=`), the other every operator that these come down to.
"""

import contextlib
import os
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
PROJECT = f"{ROOT}/lib/", f"{ROOT}/main.py"
CPU = torch.device("cpu")
TOTAL = 80 << 30  # bytes of a GPU

# Operators that the host waits for on a GPU, and what people call them.
WAITS = {
    "_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select", "equal": "equal",
    "_linalg_check_errors": "linalg's check for errors", "_linalg_eigh": "linalg's check for errors",
    "_linalg_svd": "linalg's check for errors", "bincount": "bincount",
    "repeat_interleave": "repeat_interleave", "_unique2": "unique", "unique_dim": "unique",
    "unique_consecutive": "unique",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operator."""


class CaptureError(RuntimeError):
    """The host waited while a graph was captured."""


def line() -> str:
    """file:line of the innermost frame that belongs to the project."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PROJECT):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def tensors(tree) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for part in tree for tensor in tensors(part)]


def _fresh(tensor: Tensor, among: list[Tensor]) -> bool:
    """Whether its storage is none of theirs."""
    with torch._C.DisableTorchFunction():
        return all(tensor.untyped_storage() is not other.untyped_storage() for other in among)


class PretendedGPUs:
    """What the GPUs have done so far.

    waits  (line, what) -> how often the host waited
    moved  (line, "cuda:0->cpu") -> bytes
    live   device -> bytes that tensors claim; `peak` the most so far
    """

    def __init__(self, count: int, free: int):
        self.count, self.free = count, free
        self.waits, self.moved = Counter(), Counter()
        self.live, self.peak = Counter(), Counter()
        self.current = 0
        self.capturing: Graph | None = None
        self._landing: torch.device | None = None  # where the tensors that are made now go, whatever they are made of

    def start_counting(self) -> None:
        """Forget waits, moves and peaks."""
        self.waits.clear()
        self.moved.clear()
        self.peak = Counter(self.live)

    def device(self, given) -> torch.device:
        """The device that is meant by a name, a number, a device or None."""
        device = (
            torch.device("cuda", given) if isinstance(given, int) else torch.device("cuda" if given is None else given)
        )
        return torch.device("cuda", self.current) if device.type == "cuda" and device.index is None else device

    def of(self, tensor: Tensor) -> torch.device:
        """The device that a tensor claims."""
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "cpu":
                return tensor.device  # meta
            return getattr(tensor.untyped_storage(), "claim", CPU)

    def claim(self, tensor: Tensor, device: torch.device) -> None:
        """Let a tensor's storage lie on a device, if it is not on any yet."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if device == CPU or hasattr(storage, "claim"):
            return
        if device.index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {device.index}")
        storage.claim, size = device, storage.nbytes()
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])
        weakref.finalize(storage, self.live.subtract, {device: size})

    @contextlib.contextmanager
    def landing(self, device: torch.device | None):
        before, self._landing = self._landing, device
        try:
            yield
        finally:
            self._landing = before

    def wait(self, what: str) -> None:
        if self.capturing is not None:
            raise CaptureError(f"{what} while a graph is captured, at {line()}")
        self.waits[line(), what] += 1

    def move(
        self, tensor: Tensor, target: torch.device, non_blocking: bool = False, host: Tensor | None = None
    ) -> None:
        """Count a copy of a tensor to another device; `host` is the side of it that lies on the host."""
        source = self.of(tensor)
        self.moved[line(), f"{source}->{target}"] += tensor.nbytes
        pinned = host is not None and getattr(host.untyped_storage(), "pinned", False)
        if CPU in (source, target) and not (pinned and non_blocking):
            self.wait("copy to the host" if target == CPU else "copy from the host")

    def place_of_results(self, name: str, given: list[Tensor]) -> torch.device:
        """Where an operator's results lie. Raises MixedDevicesError as a GPU does."""
        devices = [(tensor, self.of(tensor)) for tensor in given]
        on_gpu = [device for _, device in devices if device.type == "cuda"]
        if self._landing is not None or not on_gpu:
            return self._landing or CPU
        host = [tensor for tensor, device in devices if device == CPU and tensor.dim()]
        if name in INDEXING and devices[0][1] == on_gpu[0] and host:
            self.wait("copy from the host")  # indices may lie there, and are fetched
            host = []
        if len(set(on_gpu)) > 1 or host:
            found = ", ".join(f"{tuple(tensor.shape)} on {device}" for tensor, device in devices)
            raise MixedDevicesError(f"{name} of tensors on several devices: {found}, at {line()}")
        return on_gpu[0]


class _Operators(TorchDispatchMode):
    """Every operator: where its results lie, and whether the host waits for it."""

    def __init__(self, gpus: PretendedGPUs):
        super().__init__()
        self._gpus = gpus

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self._do(func, args, kwargs or {})

    def _do(self, func, args: tuple, kwargs: dict):
        gpus, name = self._gpus, func._schema.name.removeprefix("aten::")
        given = [tensor for tensor in tensors((args, kwargs)) if gpus.of(tensor).type != "meta"]
        if name == "copy_" and len(given) == 2 and gpus.of(given[0]) != gpus.of(given[1]):
            target = gpus.of(given[0])
            host = given[0] if target == CPU else given[1]
            if host.dim():  # a number is a kernel's argument
                gpus.move(given[1], target, len(args) > 2 and args[2], host)
        else:
            target = gpus.place_of_results(name, given)
        if any(gpus.of(tensor).type == "cuda" for tensor in given):
            self._count_waits(name, args)
        if name == "histc" and not args[0].is_floating_point():  # a GPU has it of integers too
            out = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        elif gpus.capturing is not None:
            out = gpus.capturing.record(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in tensors(out):
            if gpus.of(tensor) == CPU and _fresh(tensor, given):
                gpus.claim(tensor, target)
        return out

    def _count_waits(self, name: str, args: tuple) -> None:
        if name in WAITS:
            self._gpus.wait(WAITS[name])
        if name in INDEXING:
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            if masks and (len(args) < 3 or args[2].numel() != 1):  # of one value it is filled
                self._gpus.wait("indexing by a mask")


class _Functions(TorchFunctionMode):
    """Torch's Python functions: what a tensor says of its device, and all that takes a device."""

    def __init__(self, gpus: PretendedGPUs):
        super().__init__()
        self._gpus = gpus
        self._own = {
            torch.device: self._device,
            Tensor.device.__get__: gpus.of,
            Tensor.is_cuda.__get__: lambda x: gpus.of(x).type == "cuda",
            Tensor.is_cpu.__get__: lambda x: gpus.of(x) == CPU,
            Tensor.get_device: lambda x: -1 if gpus.of(x).index is None else gpus.of(x).index,
            Tensor.to: self._to,
            Tensor.cpu: lambda x, *_, **__: self._moved(x, CPU, x),
            Tensor.cuda: lambda x, device=None, non_blocking=False: self._moved(
                x, gpus.device(device), x, non_blocking
            ),
            Tensor.numpy: partial(self._on_host, Tensor.numpy),
            Tensor.__array__: partial(self._on_host, Tensor.__array__),
            Tensor.tolist: self._tolist,
            Tensor.new_tensor: lambda x, *args, **kwargs: self._made(
                Tensor.new_tensor, kwargs.pop("device", gpus.of(x)), (x, *args), kwargs
            ),
            Tensor.__deepcopy__: lambda x, memo: self._made(Tensor.__deepcopy__, gpus.of(x), (x, memo), {}),
            F.one_hot: self._one_hot,
            Tensor.pin_memory: lambda x, *_: self._pinned(x.clone()),
            Tensor.is_pinned: lambda x, *_: getattr(x.untyped_storage(), "pinned", False),
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self._own:
            return self._own[func](*args, **kwargs)
        if kwargs.get("device") is not None and self._gpus.device(kwargs["device"]).type != "meta":
            out = self._made(func, self._gpus.device(kwargs.pop("device")), args, kwargs)
            if func in (torch.tensor, torch.as_tensor) and self._gpus.of(out) != CPU:
                self._gpus.wait("copy from the host")
            return out
        return func(*args, **kwargs)

    def _device(self, *args, **kwargs) -> torch.device:
        return (
            self._gpus.device(args[0]) if len(args) == 1 and isinstance(args[0], int) else torch.device(*args, **kwargs)
        )

    def _made(self, func, device, args: tuple, kwargs: dict):
        """A function's result, made on the device."""
        pinned = kwargs.pop("pin_memory", False)
        if func is not Tensor.__deepcopy__:
            kwargs["device"] = CPU
        with self._gpus.landing(device):
            out = func(*args, **kwargs)
        for tensor in tensors(out):
            if _fresh(tensor, tensors(args)):
                self._gpus.claim(tensor, device)
        return self._pinned(out) if pinned else out

    def _to(self, x: Tensor, *args, non_blocking=False, **kwargs) -> Tensor:
        args, target = list(args), kwargs.pop("device", None)
        if (args and isinstance(args[0], Tensor)) or "other" in kwargs:
            other = kwargs.pop("other", None) if "other" in kwargs else args.pop(0)
            target, kwargs["dtype"] = self._gpus.of(other), other.dtype
        elif args and not isinstance(args[0], torch.dtype):
            target = args.pop(0)
        if len(args) > 1 and isinstance(args[1], bool):
            non_blocking = args.pop(1)
        elif args and isinstance(args[0], bool):
            non_blocking = args.pop(0)
        converted = partial(x.to, *args, **kwargs) if args or kwargs else lambda: x
        if target is None:
            return converted()
        target = self._gpus.device(target)
        if "meta" in (target.type, self._gpus.of(x).type):
            return x.to(target, *args, **kwargs)
        if target == self._gpus.of(x):
            return converted()
        with self._gpus.landing(target):
            return self._moved(x, target, converted(), non_blocking)

    def _moved(self, x: Tensor, target: torch.device, converted: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy of x on another device, of which `converted` may be one already; its gradient goes back."""
        source, gpus = self._gpus.of(x), self._gpus
        if target == source:
            return x
        gpus.move(x, target, non_blocking, x if source == CPU else None)
        with gpus.landing(target):
            out = converted if _fresh(converted, [x]) else x.clone()
        gpus.claim(out, target)

        def back(gradient: Tensor) -> Tensor:
            with gpus.landing(source):
                return gradient.clone()

        if out.requires_grad and out.grad_fn is not None:
            out.register_hook(back)
        return out

    def _one_hot(self, x: Tensor, num_classes: int = -1) -> Tensor:
        """As a GPU does it: without looking at the values, and with no zeros that C++ would lay on the CPU."""
        if num_classes < 0:
            raise NotImplementedError("one_hot without a number of classes")
        with self._gpus.landing(self._gpus.of(x)):
            return (x.unsqueeze(-1) == torch.arange(num_classes)).long()

    def _on_host(self, func, x: Tensor, *args, **kwargs):
        if self._gpus.of(x) != CPU:
            raise TypeError(f"can't convert {self._gpus.of(x)} device type tensor to numpy, at {line()}")
        return func(x, *args, **kwargs)

    def _tolist(self, x: Tensor) -> list:
        if self._gpus.of(x) != CPU:
            self._gpus.wait("tolist")
        return Tensor.tolist(x)

    def _pinned(self, x: Tensor) -> Tensor:
        x.untyped_storage().pinned = True
        return x


class Graph:
    """torch.cuda.CUDAGraph: operators are written down when it is captured, and done when it is replayed."""

    def __init__(self, *_, **__):
        self._steps: list[tuple] = []

    def record(self, func, args: tuple, kwargs: dict):
        """What the operator returns, without anything being changed by it."""
        written = [
            kwargs.get(argument.name, args[i] if i < len(args) else None)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            out = None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        else:
            out = func(*args, **kwargs)
        made = [tensor for tensor in tensors(out) if _fresh(tensor, tensors((args, kwargs)))]
        if made or written:  # else it is a view, which stays one
            self._steps.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # devices were compared at the capture
            for func, args, kwargs, made in self._steps:
                out = func(*args, **kwargs)
                for old, new in zip(made, tensors(out) if made else (), strict=True):
                    old.copy_(new)


@contextlib.contextmanager
def _captured(gpus: PretendedGPUs, graph: Graph, *_, **__):
    gpus.capturing = graph
    try:
        yield
    finally:
        gpus.capturing = None


class _Stream:
    """torch.cuda.Stream and Event: everything is done at once."""

    def __init__(self, *_, **__):
        self.cuda_stream = 0

    def __getattr__(self, name: str):
        return lambda *_, **__: None


def _cuda(gpus: PretendedGPUs) -> dict[str, object]:
    """What of torch.cuda is another."""

    def index(given=None) -> int:
        return gpus.device(given).index

    def properties(given=None):
        return types.SimpleNamespace(
            name=get_name(given), total_memory=TOTAL, major=9, minor=0, multi_processor_count=132
        )

    def get_name(given=None) -> str:
        return f"Pretended {index(given)}"

    def set_current(given) -> None:
        gpus.current = index(given)

    @contextlib.contextmanager
    def inside(given):
        before = gpus.current
        set_current(before if given is None else given)
        try:
            yield
        finally:
            gpus.current = before

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: gpus.count, "current_device": lambda: gpus.current, "set_device": set_current,
        "device": inside, "get_device_name": get_name, "get_device_properties": properties,
        "get_device_capability": lambda given=None: (9, 0), "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda given=None: (gpus.free - gpus.live[gpus.device(given)], TOTAL),
        "memory_allocated": lambda given=None: gpus.live[gpus.device(given)],
        "memory_reserved": lambda given=None: gpus.live[gpus.device(given)],
        "max_memory_allocated": lambda given=None: gpus.peak[gpus.device(given)],
        "max_memory_reserved": lambda given=None: gpus.peak[gpus.device(given)],
        "reset_peak_memory_stats": lambda given=None: None, "empty_cache": lambda: None,
        "synchronize": lambda given=None: gpus.wait(f"synchronize {gpus.device(given)}"),
        "manual_seed_all": lambda seed: None, "get_rng_state": lambda given=None: torch.get_rng_state(),
        "set_rng_state": lambda state, given=None: None, "is_current_stream_capturing": lambda: bool(gpus.capturing),
        "Stream": _Stream, "Event": _Stream, "current_stream": _Stream, "stream": contextlib.nullcontext,
        "CUDAGraph": Graph, "graph": partial(_captured, gpus),
    }  # fmt: skip


def _forget_what_is_cached() -> None:
    """Functions of the project may have kept tensors that claim a device."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lib":
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def pretended_gpus(count: int = 1, free: int = TOTAL) -> Iterator[PretendedGPUs]:
    """While there are so many GPUs of TOTAL bytes, so many of them free on each."""
    gpus, autocast = PretendedGPUs(count, free), torch.amp.autocast_mode.autocast
    entered = autocast.__init__

    def on_cpu(self, device_type, *args, **kwargs) -> None:
        entered(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    go_back = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        with _Functions(gpus):  # torch's own functions run without: here blocks are run again
            return go_back(*args, **kwargs)

    accelerator = {
        "is_available": lambda: True, "device_count": lambda: count, "empty_cache": lambda: None,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: gpus.current, "current_stream": _Stream,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))  # modes are a thread's own
        stack.enter_context(patch.object(autocast, "__init__", on_cpu))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", backward))
        # What is computed again would be compared with what C++ said of its device.
        stack.enter_context(patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda _: None))
        stack.enter_context(patch.multiple(torch.accelerator, **accelerator))
        stack.enter_context(patch.multiple(torch.cuda, **_cuda(gpus)))
        stack.callback(_forget_what_is_cached)
        stack.enter_context(_Functions(gpus))
        stack.enter_context(_Operators(gpus))
        yield gpus
