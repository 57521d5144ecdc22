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
from .vectors import load_half_word, load_long, load_mask, ones, store_half_word, take

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass(frozen=True)
class Variant:
    """A way to compute: `needs` are features of the processor, `reads` is the dtype of the vector, `make` gives for a
    kind of values and a number of tokens two functions: row(values, mask, x, x_bytes, words, table, out, out_bytes),
    the products of a row with so many tokens, of x_bytes each; unpack(values, mask, out, words, table).
    """

    name: str
    needs: frozenset[str]
    kinds: tuple[torch.dtype, ...]
    reads: torch.dtype
    make: Callable[[torch.dtype, int], tuple[Callable, Callable]]


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _avx512_bf16(_kind: torch.dtype, tokens: int):
    """32 values expanded in one register, and their products summed in pairs."""
    lanes, sums = vectors.of(32), vectors.of_bfloat16(tokens)
    zero, add, store, load_values, store_values = sums.zero, sums.add, sums.store, lanes.load, lanes.store
    expand = vectors.expand_values

    def row(values, mask, x, x_bytes, words, _table, out, out_bytes):
        even, odd = zero(), zero()
        for word in range(0, words - 1, 2):  # two sums, as one would wait for itself
            bits = load_mask(mask + 4 * word)
            even = add(even, expand(load_values(values), bits), x + 64 * word, x_bytes)
            values += 2 * ones(bits)
            bits = load_mask(mask + 4 * word + 4)
            odd = add(odd, expand(load_values(values), bits), x + 64 * word + 64, x_bytes)
            values += 2 * ones(bits)
        if words % 2:
            bits = load_mask(mask + 4 * (words - 1))
            even = add(even, expand(load_values(values), bits), x + 64 * (words - 1), x_bytes)
        store(even, odd, out, out_bytes)

    def unpack(values, mask, out, words, _table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            store_values(out + 64 * word, expand(load_values(values), bits))
            values += 2 * ones(bits)

    return row, unpack


def _avx512(kind: torch.dtype, tokens: int):
    """16 values widened to float32, and expanded."""
    lanes, sums = vectors.of(16), vectors.of_floats(tokens, 16)
    zero, add, store, load_values, widen = sums.zero, sums.add, sums.store, lanes.load, getattr(lanes, _name(kind))
    expand = vectors.expand_floats

    def row(values, mask, x, x_bytes, words, _table, out, out_bytes):
        low, high = zero(), zero()
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            low = add(low, expand(widen(load_values(values)), bits), x + 128 * word, x_bytes)
            values += 2 * ones(numpy.uint32(bits & numpy.uint32(0xFFFF)))
            bits = numpy.uint32(bits >> numpy.uint32(16))
            high = add(high, expand(widen(load_values(values)), bits), x + 128 * word + 64, x_bytes)
            values += 2 * ones(bits)
        store(low, high, out, out_bytes)

    return row, _avx2(kind, 1)[1]


def _avx2(kind: torch.dtype, tokens: int):
    """8 values moved to their places by a table of 256 shuffles, and widened to float32."""
    lanes, sums = vectors.of(8), vectors.of_floats(tokens, 8)
    zero, add, store, load_values, widen = sums.zero, sums.add, sums.store, lanes.load, getattr(lanes, _name(kind))
    shuffle, store_values = vectors.shuffle_values, lanes.store

    def row(values, mask, x, x_bytes, words, table, out, out_bytes):
        even, odd = zero(), zero()
        for half in range(2 * words):
            bits = numpy.uint32(load_half_word(mask + 2 * half))
            byte = numpy.uint32(bits & numpy.uint32(0xFF))
            even = add(even, widen(shuffle(load_values(values), table + 16 * byte)), x + 64 * half, x_bytes)
            values += 2 * ones(byte)
            byte = numpy.uint32(bits >> numpy.uint32(8))
            odd = add(odd, widen(shuffle(load_values(values), table + 16 * byte)), x + 64 * half + 32, x_bytes)
            values += 2 * ones(byte)
        store(even, odd, out, out_bytes)

    def unpack(values, mask, out, words, table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for part in range(4):
                byte = numpy.uint32(bits & numpy.uint32(0xFF))
                store_values(out + 64 * word + 16 * part, shuffle(load_values(values), table + 16 * byte))
                values += 2 * ones(byte)
                bits = numpy.uint32(bits >> numpy.uint32(8))

    return row, unpack


def _plain(kind: torch.dtype, tokens: int):
    """One weight at a time, on any processor."""
    widen, load_float, store_float = getattr(vectors, f"from_{_name(kind)}"), vectors.load_float, vectors.store_float

    def row(values, mask, x, x_bytes, words, _table, out, out_bytes):
        for token in range(tokens):
            total, place = numpy.float32(0), values
            for word in range(words):
                bits = load_mask(mask + 4 * word)
                for lane in range(32):
                    weight = numpy.float32(0)
                    if bits >> numpy.uint32(lane) & numpy.uint32(1):
                        weight = widen(load_half_word(place))
                        place += 2
                    total += weight * load_float(x + token * x_bytes + 128 * word + 4 * lane)
            store_float(out + token * out_bytes, total)

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
def compiled_product(variant: Variant, kind: torch.dtype, at_once: int):
    """A C function of a job's address: out (TOKENS, ROWS) float32 of x (TOKENS, ...), `at_once` tokens at a time, of
    which TOKENS is a multiple. Any number of threads may run it at once: each takes a chunk of rows until there are
    none left.
    """
    row = njit(variant.make(kind, at_once)[0])

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
                for token in range(0, tokens, at_once):  # the row lies in the cache from the first on
                    to = out + 4 * (token * rows + i)
                    row(own, mask, x + token * x_bytes, x_bytes, words, table, to, 4 * rows)

    return multiply


@functools.cache
def compiled_unpacking(variant: Variant, kind: torch.dtype):
    """Likewise: rows from FIRST on, into out (ROWS, 32 WORDS)."""
    unpack = njit(variant.make(kind, 1)[1])

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

    return expand


def shuffles() -> numpy.ndarray:
    """(256, 16) uint8: for each mask of 8 weights, which byte of 8 packed values goes where; 128 is a zero."""
    table = numpy.full((256, 8, 2), 128, dtype=numpy.uint8)
    for mask in range(256):
        lanes = [lane for lane in range(8) if mask >> lane & 1]
        for place, lane in enumerate(lanes):
            table[mask, lane] = 2 * place, 2 * place + 1
    return table.reshape(256, 16)
