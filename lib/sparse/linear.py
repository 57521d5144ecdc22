"""A linear map whose matrix is held without its zeros."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .format import Form, Packed, pack
from .indexed import Indexed, pack_indexed
from .sliced import Sliced, pack_sliced

PACK = {Packed: pack, Indexed: pack_indexed, Sliced: pack_sliced}
FORMS = {form.__name__: form for form in PACK}


class SparseLinear(nn.Module):
    """x W^T + b with W packed, in place of an nn.Linear or what computes the same.

    Few tokens at once are multiplied by a kernel that reads the packed matrix; for more, it is unpacked, on a CPU in
    strips, and goes through the ordinary product. Outputs have the dtype of x. Where x needs a gradient it gets one, by
    the whole matrix, unpacked. To a compiler the product is one operation, where no gradients are asked for.

    dtype       of the weights to whoever asks for them
    max_tokens  most tokens at once that the kernel is given
    transposed  whether `weight` is shown as (in, out)
    """

    holds_packed = True  # lib/blocks.py refuses to prune it

    def __init__(
        self,
        packed: Form,
        bias: Tensor | None,
        dtype: torch.dtype,
        max_tokens: int = 1,
        transposed: bool = False,
    ):
        super().__init__()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.in_features, self.out_features = packed.columns, packed.rows
        self.dtype, self.max_tokens, self.transposed = dtype, max_tokens, transposed
        self._hold(packed)

    def _hold(self, packed: Form) -> None:
        self.kind, self._form, self._names = packed.kind, type(packed), packed.names()
        for name in {name for form in PACK for name in form.names()}:
            self._buffers.pop(name, None)
        for name, tensor in zip(self._names, packed.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def _tensors(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._names]

    @property
    def packed(self) -> Form:
        return self._form(*self._tensors, columns=self.in_features, kind=self.kind)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, unpacked at every call: for what reads a layer's weights instead of calling it."""
        dense = self._dense().as_subclass(_Shown)
        dense.layer = self
        return dense

    def _dense(self) -> Tensor:
        dense = self.packed.dense().to(self.dtype)
        return dense.T if self.transposed else dense

    def write(self, weight: Tensor) -> None:
        """Pack other values, given as `weight` has them."""
        self._hold(PACK[self._form](weight.T if self.transposed else weight))

    def _apply(self, fn, recurse=True):
        """Moved to where it cannot be multiplied as it is packed, it is packed as is right there."""
        before = self.offsets.device
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before)).dtype
        if self._form not in forms_for(self.offsets) and not self.offsets.is_meta:
            if before.type == "cuda":
                torch.cuda.synchronize(before)  # a copy to the host may not wait to be there
            self._hold(pack_for_device(self.packed.dense()))
        return self

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and (compiling or x.requires_grad):  # a compiler may be asked for derivatives later
            return F.linear(x, self.packed.dense().to(x.dtype), self.bias)
        rows = x.reshape(-1, self.in_features)
        if compiling:
            shape = self.out_features, self.in_features
            found = _multiply(self._form.__name__, self._tensors, rows, *shape, self.kind, self.max_tokens)
        else:
            found = multiply(self.packed, rows, self.max_tokens)
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def copy(self) -> "SparseLinear":
        """One with memory of its own."""
        return copy.deepcopy(self)

    def extra_repr(self) -> str:
        sparsity = "unknown" if self.offsets.is_meta else f"{self.packed.sparsity:.3f}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={sparsity}, values={str(self.kind).removeprefix('torch.')}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """As an ordinary layer saves itself."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._dense()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """From what an ordinary layer has saved."""
        name = prefix + "weight"
        beside = {key: value for key, value in state_dict.items() if key.startswith(prefix) and key != name}
        super()._load_from_state_dict(beside, prefix, local_metadata, strict, missing, unexpected, errors)
        shape = (self.out_features, self.in_features)[:: -1 if self.transposed else 1]
        if name not in state_dict:
            missing.append(name)
        elif state_dict[name].shape != shape:
            errors.append(f"size mismatch for {name}: {tuple(state_dict[name].shape)} in place of {shape}")
        else:
            self.write(state_dict[name].to(self.offsets.device, self.dtype))


class _Shown(Tensor):
    """A layer's weight, unpacked. What changes it in place changes the layer: some models scale their weights. Views of
    it, such as its transpose, are copies.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        if function == Tensor.data.__get__:
            return args[0]
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        changed = args[0] if in_place else kwargs.get("out")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if isinstance(changed, cls):
                changed.layer.write(changed.as_subclass(Tensor))
        return result


def forms_for(tensor: Tensor) -> tuple[type, ...]:
    """What its device multiplies by, with few zeros and with many."""
    return (Sliced,) if tensor.is_cuda else (Packed, Indexed)


def pack_for_device(weight: Tensor) -> Form:
    """A matrix (rows, columns) without its zeros, as its device multiplies by it."""
    return PACK[forms_for(weight)[0]](weight)


def multiply(packed: Form, x: Tensor, max_tokens: int) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in float32 or the dtype of x."""
    from . import cpu, cuda  # numba takes a second to import, and packing does without

    if not isinstance(packed, forms_for(x)) or x.device != packed.offsets.device or x.is_meta:
        # Some libraries move a module's tensors one by one.
        return cuda.product(packed, x)
    backend = cuda if isinstance(packed, Sliced) else cpu
    return backend.multiply(packed, x) if 0 < x.shape[0] <= max_tokens else backend.product(packed, x)


@torch.library.custom_op("alphapruning::multiply", mutates_args=())
def _multiply(
    form: str, tensors: list[Tensor], x: Tensor, rows: int, columns: int, kind: torch.dtype, max_tokens: int
) -> Tensor:
    """`multiply` for compilers, which leave it as it is."""
    return multiply(FORMS[form](*tensors, columns=columns, kind=kind), x, max_tokens).to(x.dtype)


@_multiply.register_fake
def _(form, tensors, x, rows, columns, kind, max_tokens):
    return x.new_empty(x.shape[0], rows)
