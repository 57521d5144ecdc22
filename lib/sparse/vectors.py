"""Vector instructions inside numba's kernels: a vector type, and operations on it that LLVM has.

numba has no vectors of its own. Each operation is given the LLVM values of its arguments and says what to make of
them; addresses are int64.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

BIT, BYTE, HALF_WORD, WORD, LONG, FLOAT = (*(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType())
ADDRESS, MASK = types.int64, types.uint32
NOTHING = ir.Constant(BYTE.as_pointer(), None)  # what numba has for None


class Vector(types.Type):
    """`count` values of an LLVM type in a register."""

    def __init__(self, count: int, element: ir.Type):
        self.llvm = ir.VectorType(element, count)
        super().__init__(name=f"Vector({self.llvm})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector):
        super().__init__(manager, vector, vector.llvm)


def operation(result: types.Type, *arguments: types.Type):
    """Makes a function of numba out of one that is called with the LLVM builder and its arguments' values."""

    def made_of(emit):
        def typed(_context, *_given):
            return result(*arguments), lambda _context, builder, _signature, values: emit(builder, *values)

        typed.__name__, typed.__signature__ = emit.__name__, inspect.signature(emit)  # where numba counts arguments
        return intrinsic(typed)

    return made_of


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value, **options) -> ir.Value:
    """Of one of LLVM's intrinsic functions."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values, **options)


def filled(vector: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(vector, [number] * vector.count)


def _bytes(kind: ir.Type) -> int:
    """Of a number, or of each in a vector."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return 4 if isinstance(element, ir.FloatType) else element.width // 8


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=_bytes(kind))


def loading(result: types.Type, kind: ir.Type):
    """The operation that reads an LLVM type at an address."""

    def emit(builder, address):
        return load(builder, address, kind)

    return operation(result, ADDRESS)(emit)


def storing(given: types.Type, kind: ir.Type):
    """The operation that writes an LLVM type to an address."""

    def emit(builder, address, value):
        builder.store(value, builder.inttoptr(address, kind.as_pointer()), align=_bytes(kind))
        return NOTHING

    return operation(types.void, ADDRESS, given)(emit)


load_long, load_mask = loading(types.int64, LONG), loading(types.uint32, WORD)
load_half_word, store_half_word = loading(types.uint16, HALF_WORD), storing(types.uint16, HALF_WORD)
load_float, store_float = loading(types.float32, FLOAT), storing(types.float32, FLOAT)


@operation(MASK, ADDRESS)
def load_byte(builder, address):
    return builder.zext(load(builder, address, BYTE), WORD)


@operation(types.int64, ADDRESS, types.int64)
def take(builder, address, count):
    """Adds to a number that several threads add to; what it was before."""
    return builder.atomic_rmw("add", builder.inttoptr(address, LONG.as_pointer()), count, "monotonic")


@operation(types.int64, MASK)
def ones(builder, mask):
    return builder.zext(builder.ctpop(mask), LONG)


@operation(types.float32, types.uint16)
def from_bfloat16(builder, value):
    return builder.bitcast(builder.shl(builder.zext(value, WORD), WORD(16)), FLOAT)


@operation(types.float32, types.uint16)
def from_float16(builder, value):
    return builder.fpext(builder.bitcast(value, ir.HalfType()), FLOAT)


class Sums(types.Type):
    """A vector of `lanes` float32 for each of so many tokens."""

    def __init__(self, tokens: int, lanes: int):
        self.llvm = ir.ArrayType(ir.VectorType(FLOAT, lanes), tokens)
        super().__init__(name=f"Sums({self.llvm})")


register_model(Sums)(_VectorModel)


def sums_of(tokens: int, lanes: int, weights: Vector, add: Callable) -> SimpleNamespace:
    """What accumulates a row's products with several tokens at once, each weight being read once.

    zero()                              sums, all zero
    add(sums, weights, x, x_bytes)      with weights times what lies at x, and x_bytes further on for the next token;
                                        add(builder, sum, weights, address) is how one of them is formed
    store(sums, out, out_bytes)         the total over the lanes for each token
    """
    sums, zero, store = _totals(tokens, lanes)

    @operation(sums, sums, weights, ADDRESS, types.int64)
    def add_row(builder, row, weight, x, x_bytes):
        for token in range(tokens):
            row = builder.insert_value(row, add(builder, builder.extract_value(row, token), weight, x), token)
            x = builder.add(x, x_bytes)
        return row

    return SimpleNamespace(zero=zero, add=add_row, store=store)


def _totals(tokens: int, lanes: int) -> tuple[Sums, Callable, Callable]:
    """The type of such sums, and how they begin and end."""
    sums = Sums(tokens, lanes)
    each, number = sums.llvm.element, ir.Constant(FLOAT, 0.0)

    @operation(sums)
    def zero(_builder):
        return ir.Constant(sums.llvm, [filled(each, 0.0)] * tokens)

    @operation(types.void, sums, ADDRESS, types.int64)
    def store(builder, row, out, out_bytes):
        for token in range(tokens):
            own, name = builder.extract_value(row, token), f"llvm.vector.reduce.fadd.v{lanes}f32"
            value = call(builder, name, FLOAT, number, own, fastmath=("reassoc",))
            builder.store(value, builder.inttoptr(out, FLOAT.as_pointer()), align=4)
            out = builder.add(out, out_bytes)
        return NOTHING

    return sums, zero, store


def of_floats(tokens: int, lanes: int) -> SimpleNamespace:
    """Sums whose weights are float32, as the tokens are."""
    floats = ir.VectorType(FLOAT, lanes)

    def add(builder, total, weight, x):
        return call(builder, f"llvm.fma.v{lanes}f32", floats, weight, load(builder, x, floats), total)

    return sums_of(tokens, lanes, Vector(lanes, FLOAT), add)


def of_bfloat16(tokens: int) -> SimpleNamespace:
    """Sums of products of 32 weights and 32 numbers of each token in bfloat16, added in pairs. AVX-512 BF16."""
    pairs, name = ir.VectorType(WORD, 16), "llvm.x86.avx512bf16.dpbf16ps.512"

    def add(builder, total, weight, x):
        return call(builder, name, total.type, total, builder.bitcast(weight, pairs), load(builder, x, pairs))

    return sums_of(tokens, 16, Vector(32, HALF_WORD), add)


def of_quads(tokens: int) -> SimpleNamespace:
    """Sums of products of four float32 weights with numbers that lie anywhere within 256.

    add(sums, weights, places, x, x_bytes)  with the numbers that the four bytes at `places` say
    """
    floats, (sums, zero, store) = ir.VectorType(FLOAT, 4), _totals(tokens, 4)

    @operation(sums, sums, Vector(4, FLOAT), ADDRESS, ADDRESS, types.int64)
    def add(builder, row, weight, places, x, x_bytes):
        places, offsets = load(builder, places, WORD), []
        for lane in range(4):
            place = builder.and_(builder.lshr(places, WORD(8 * lane)), WORD(255))
            offsets.append(builder.shl(builder.zext(place, LONG), LONG(2)))
        for token in range(tokens):
            numbers = filled(floats, 0.0)
            for lane, offset in enumerate(offsets):
                numbers = builder.insert_element(numbers, load(builder, builder.add(x, offset), FLOAT), WORD(lane))
            own = builder.extract_value(row, token)
            own = call(builder, "llvm.fmuladd.v4f32", floats, weight, numbers, own)
            row, x = builder.insert_value(row, own, token), builder.add(x, x_bytes)
        return row

    return SimpleNamespace(zero=zero, add=add, store=store)


def of(count: int) -> SimpleNamespace:
    """Operations on `count` values of 16 bits at a time: load and store at an address; bfloat16 and float16, which
    widen them to float32.
    """
    floats, values = Vector(count, FLOAT), Vector(count, HALF_WORD)
    words = ir.VectorType(WORD, count)

    @operation(floats, values)
    def bfloat16(builder, vector):
        return builder.bitcast(builder.shl(builder.zext(vector, words), filled(words, 16)), floats.llvm)

    @operation(floats, values)
    def float16(builder, vector):
        return builder.fpext(builder.bitcast(vector, ir.VectorType(ir.HalfType(), count)), floats.llvm)

    load_values, store_values = loading(values, values.llvm), storing(values, values.llvm)
    return SimpleNamespace(load=load_values, store=store_values, bfloat16=bfloat16, float16=float16)


_FLOATS_16, _VALUES_32, _VALUES_8 = Vector(16, FLOAT), Vector(32, HALF_WORD), Vector(8, HALF_WORD)


@operation(_FLOATS_16, _FLOATS_16, MASK)
def expand_floats(builder, vector, mask):
    """The first floats moved to where the 16 low bits of the mask are set, and zeros elsewhere. AVX-512F."""
    bits = builder.bitcast(builder.trunc(mask, HALF_WORD), ir.VectorType(BIT, 16))
    kind = _FLOATS_16.llvm
    return call(builder, "llvm.x86.avx512.mask.expand.v16f32", kind, vector, filled(kind, 0.0), bits)


@operation(_VALUES_32, _VALUES_32, MASK)
def expand_values(builder, vector, mask):
    """The first values moved to where the mask is set, and zeros elsewhere. AVX-512 VBMI2."""
    bits, kind = builder.bitcast(mask, ir.VectorType(BIT, 32)), _VALUES_32.llvm
    return call(builder, "llvm.x86.avx512.mask.expand.v32i16", kind, vector, filled(kind, 0), bits)


@operation(_VALUES_8, _VALUES_8, ADDRESS)
def shuffle_values(builder, vector, address):
    """Bytes moved to where the 16 bytes at the address say, zeros where those have their highest bit. SSSE3."""
    kind = ir.VectorType(BYTE, 16)
    moved = call(
        builder, "llvm.x86.ssse3.pshuf.b.128", kind, builder.bitcast(vector, kind), load(builder, address, kind)
    )
    return builder.bitcast(moved, _VALUES_8.llvm)
