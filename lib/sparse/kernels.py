"""The CPU's inner loops, by what instructions there are: one row times a vector, and one row unpacked.

All take addresses. Absent weights are multiplied as zeros, so that NaN and infinity in the vector do what they do in a
dense product.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from numba import cfunc, njit, types

from . import vectors
from .format import KINDS
from .vectors import load_half_word, load_long, load_mask, ones, store_float, store_half_word, take

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass(frozen=True)
class Variant:
    """A way to compute: `needs` are features of the processor, `reads` is the dtype of the vector, `make` gives for a
    kind of values two functions: row(values, mask, x, words, table), the product; unpack(values, mask, out, words,
    table).
    """

    name: str
    needs: frozenset[str]
    kinds: tuple[torch.dtype, ...]
    reads: torch.dtype
    make: Callable[[torch.dtype], tuple[Callable, Callable]]


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _avx512_bf16(_kind: torch.dtype):
    """32 values expanded in one register, and their products summed in pairs."""
    lanes, sixteen = vectors.of(32), vectors.of(16)
    zero, total, load_values, store_values = sixteen.zero, sixteen.total, lanes.load_values, lanes.store_values
    expand, add_products = vectors.expand_values, vectors.add_products

    def row(values, mask, x, words, _table):
        even, odd = zero(), zero()
        for word in range(0, words - 1, 2):  # two sums, as one would wait for itself
            bits = load_mask(mask + 4 * word)
            even = add_products(even, expand(load_values(values), bits), load_values(x + 64 * word))
            values += 2 * ones(bits)
            bits = load_mask(mask + 4 * word + 4)
            odd = add_products(odd, expand(load_values(values), bits), load_values(x + 64 * word + 64))
            values += 2 * ones(bits)
        if words % 2:
            bits = load_mask(mask + 4 * (words - 1))
            even = add_products(even, expand(load_values(values), bits), load_values(x + 64 * (words - 1)))
        return total(even) + total(odd)

    def unpack(values, mask, out, words, _table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            store_values(out + 64 * word, expand(load_values(values), bits))
            values += 2 * ones(bits)

    return row, unpack


def _avx512(kind: torch.dtype):
    """16 values widened to float32, and expanded."""
    lanes = vectors.of(16)
    zero, total, multiply_add = lanes.zero, lanes.total, lanes.multiply_add
    load_values, load_floats, widen = lanes.load_values, lanes.load_floats, getattr(lanes, _name(kind))
    expand = vectors.expand_floats

    def row(values, mask, x, words, _table):
        low, high = zero(), zero()
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            low = multiply_add(expand(widen(load_values(values)), bits), load_floats(x + 128 * word), low)
            values += 2 * ones(numpy.uint32(bits & numpy.uint32(0xFFFF)))
            bits = numpy.uint32(bits >> numpy.uint32(16))
            high = multiply_add(expand(widen(load_values(values)), bits), load_floats(x + 128 * word + 64), high)
            values += 2 * ones(bits)
        return total(low) + total(high)

    return row, _avx2(kind)[1]


def _avx2(kind: torch.dtype):
    """8 values moved to their places by a table of 256 shuffles, and widened to float32."""
    lanes = vectors.of(8)
    zero, total, multiply_add = lanes.zero, lanes.total, lanes.multiply_add
    load_values, load_floats, widen = lanes.load_values, lanes.load_floats, getattr(lanes, _name(kind))
    shuffle, store_values = vectors.shuffle_values, lanes.store_values

    def row(values, mask, x, words, table):
        a, b = zero(), zero()
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for part in range(0, 4, 2):
                byte = numpy.uint32(bits & numpy.uint32(0xFF))
                a = multiply_add(
                    widen(shuffle(load_values(values), table + 16 * byte)), load_floats(x + 128 * word + 32 * part), a
                )
                values += 2 * ones(byte)
                byte = numpy.uint32((bits >> numpy.uint32(8)) & numpy.uint32(0xFF))
                b = multiply_add(
                    widen(shuffle(load_values(values), table + 16 * byte)),
                    load_floats(x + 128 * word + 32 * part + 32), b,
                )  # fmt: skip
                values += 2 * ones(byte)
                bits = numpy.uint32(bits >> numpy.uint32(16))
        return total(a) + total(b)

    def unpack(values, mask, out, words, table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for part in range(4):
                byte = numpy.uint32(bits & numpy.uint32(0xFF))
                store_values(out + 64 * word + 16 * part, shuffle(load_values(values), table + 16 * byte))
                values += 2 * ones(byte)
                bits = numpy.uint32(bits >> numpy.uint32(8))

    return row, unpack


def _plain(kind: torch.dtype):
    """One weight at a time, on any processor."""
    widen = getattr(vectors, f"from_{_name(kind)}")
    load_float = vectors.load_float

    def row(values, mask, x, words, _table):
        total = numpy.float32(0)
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for lane in range(32):
                weight = numpy.float32(0)
                if bits >> numpy.uint32(lane) & numpy.uint32(1):
                    weight = widen(load_half_word(values))
                    values += 2
                total += weight * load_float(x + 128 * word + 4 * lane)
        return total

    def unpack(values, mask, out, words, _table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for lane in range(32):
                weight = numpy.uint16(0)
                if bits >> numpy.uint32(lane) & numpy.uint32(1):
                    weight = load_half_word(values)
                    values += 2
                store_half_word(out + 64 * word + 2 * lane, weight)

    return row, unpack


VARIANTS = (  # the fastest first
    Variant("avx512_bf16", frozenset({*AVX512, "avx512vbmi2", "avx512bf16"}), (torch.bfloat16,), torch.bfloat16,
            _avx512_bf16),
    Variant("avx512", frozenset({*AVX512, "avx2", "ssse3", "f16c"}), KINDS, torch.float32, _avx512),
    Variant("avx2", frozenset({"avx2", "ssse3", "fma", "f16c"}), KINDS, torch.float32, _avx2),
    Variant("plain", frozenset(), KINDS, torch.float32, _plain),
)  # fmt: skip

# What a job is made of: int64 each, addresses and counts.
NEXT, ROWS, CHUNK, WORDS, TOKENS, MASKS, VALUES, OFFSETS, X, OUT, TABLE, FIRST, X_BYTES, FIELDS = range(14)
_JOB = types.void(types.int64)


@functools.cache
def compiled(variant: Variant, kind: torch.dtype):
    """Two C functions of a job's address, the product and the unpacking, that any number of threads may run at once:
    each takes so many rows as are a chunk until there are none left.

    Product: out (TOKENS, ROWS) float32 of x (TOKENS, ...). Unpacking: rows from FIRST on, into out (ROWS, 32 WORDS).
    """
    row, unpack = map(njit, variant.make(kind))

    @cfunc(_JOB)
    def multiply(job):
        rows, chunk, words = load_long(job + 8 * ROWS), load_long(job + 8 * CHUNK), load_long(job + 8 * WORDS)
        masks, values, offsets = load_long(job + 8 * MASKS), load_long(job + 8 * VALUES), load_long(job + 8 * OFFSETS)
        x, out, table = load_long(job + 8 * X), load_long(job + 8 * OUT), load_long(job + 8 * TABLE)
        tokens, x_bytes = load_long(job + 8 * TOKENS), load_long(job + 8 * X_BYTES)
        while True:
            begin = take(job + 8 * NEXT, chunk)
            if begin >= rows:
                break
            for i in range(begin, min(begin + chunk, rows)):
                own, mask = values + 2 * load_long(offsets + 8 * i), masks + 4 * words * i
                for token in range(tokens):  # the row lies in the cache from the first on
                    store_float(out + 4 * (token * rows + i), row(own, mask, x + token * x_bytes, words, table))

    @cfunc(_JOB)
    def expand(job):
        rows, chunk, words = load_long(job + 8 * ROWS), load_long(job + 8 * CHUNK), load_long(job + 8 * WORDS)
        masks, values, offsets = load_long(job + 8 * MASKS), load_long(job + 8 * VALUES), load_long(job + 8 * OFFSETS)
        first, out, table = load_long(job + 8 * FIRST), load_long(job + 8 * OUT), load_long(job + 8 * TABLE)
        while True:
            begin = take(job + 8 * NEXT, chunk)
            if begin >= rows:
                break
            for i in range(begin, min(begin + chunk, rows)):
                own, mask = values + 2 * load_long(offsets + 8 * (first + i)), masks + 4 * words * (first + i)
                unpack(own, mask, out + 64 * words * i, words, table)

    return multiply, expand


def shuffles() -> numpy.ndarray:
    """(256, 16) uint8: for each mask of 8 weights, which byte of 8 packed values goes where; 128 is a zero."""
    table = numpy.full((256, 8, 2), 128, dtype=numpy.uint8)
    for mask in range(256):
        lanes = [lane for lane in range(8) if mask >> lane & 1]
        for place, lane in enumerate(lanes):
            table[mask, lane] = 2 * place, 2 * place + 1
    return table.reshape(256, 16)
