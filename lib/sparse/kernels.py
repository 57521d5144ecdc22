"""The CPU's inner loops, by what instructions there are: two rows times vectors, and one row unpacked.

All take addresses. By masks, absent weights are multiplied as zeros, so that NaN and infinity in the vector do what
they do in a dense product; by columns they are left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from numba import cfunc, njit, types

from . import vectors
from .format import KINDS
from .indexed import BLOCK, QUAD
from .vectors import load_byte, load_half_word, load_long, load_mask, ones, store_half_word, take

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass(frozen=True)
class Variant:
    """A way to compute: `needs` are features of the processor, `reads` is the dtype of the vector.

    make(kind of the values, tokens) gives two functions:
    rows(values and mask of one, of another, x, x_bytes, words, table, out of one, of the other, out_bytes): the
    products of two rows with so many tokens, which lie so many bytes apart;
    unpack(values, mask, out, words, table).
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

    def rows(one, one_mask, two, two_mask, x, x_bytes, words, _table, one_out, two_out, out_bytes):
        first, second = zero(), zero()
        for word in range(words):
            bits = load_mask(one_mask + 4 * word)
            first = add(first, expand(load_values(one), bits), x + 64 * word, x_bytes)
            one += 2 * ones(bits)
            bits = load_mask(two_mask + 4 * word)
            second = add(second, expand(load_values(two), bits), x + 64 * word, x_bytes)
            two += 2 * ones(bits)
        store(first, one_out, out_bytes)
        store(second, two_out, out_bytes)

    def unpack(values, mask, out, words, _table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            store_values(out + 64 * word, expand(load_values(values), bits))
            values += 2 * ones(bits)

    return rows, unpack


def _avx512(kind: torch.dtype, tokens: int):
    """16 values widened to float32, and expanded."""
    lanes, sums = vectors.of(16), vectors.of_floats(tokens, 16)
    zero, add, store, load_values, widen = sums.zero, sums.add, sums.store, lanes.load, getattr(lanes, _name(kind))
    expand = vectors.expand_floats

    def rows(one, one_mask, two, two_mask, x, x_bytes, words, _table, one_out, two_out, out_bytes):
        first, second = zero(), zero()
        for half in range(2 * words):
            bits = numpy.uint32(load_half_word(one_mask + 2 * half))
            first = add(first, expand(widen(load_values(one)), bits), x + 64 * half, x_bytes)
            one += 2 * ones(bits)
            bits = numpy.uint32(load_half_word(two_mask + 2 * half))
            second = add(second, expand(widen(load_values(two)), bits), x + 64 * half, x_bytes)
            two += 2 * ones(bits)
        store(first, one_out, out_bytes)
        store(second, two_out, out_bytes)

    return rows, _avx2(kind, 1)[1]


def _avx2(kind: torch.dtype, tokens: int):
    """8 values moved to their places by a table of 256 shuffles, and widened to float32."""
    lanes, sums = vectors.of(8), vectors.of_floats(tokens, 8)
    zero, add, store, load_values, widen = sums.zero, sums.add, sums.store, lanes.load, getattr(lanes, _name(kind))
    shuffle, store_values = vectors.shuffle_values, lanes.store

    def rows(one, one_mask, two, two_mask, x, x_bytes, words, table, one_out, two_out, out_bytes):
        first, second = zero(), zero()
        for byte in range(4 * words):
            bits = load_byte(one_mask + byte)
            first = add(first, widen(shuffle(load_values(one), table + 16 * bits)), x + 32 * byte, x_bytes)
            one += 2 * ones(bits)
            bits = load_byte(two_mask + byte)
            second = add(second, widen(shuffle(load_values(two), table + 16 * bits)), x + 32 * byte, x_bytes)
            two += 2 * ones(bits)
        store(first, one_out, out_bytes)
        store(second, two_out, out_bytes)

    def unpack(values, mask, out, words, table):
        for byte in range(4 * words):
            bits = load_byte(mask + byte)
            store_values(out + 16 * byte, shuffle(load_values(values), table + 16 * bits))
            values += 2 * ones(bits)

    return rows, unpack


def _plain(kind: torch.dtype, tokens: int):
    """One weight at a time, on any processor."""
    widen, load_float, store_float = getattr(vectors, f"from_{_name(kind)}"), vectors.load_float, vectors.store_float

    @njit
    def product(values, mask, x, words):
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

    def rows(one, one_mask, two, two_mask, x, x_bytes, words, _table, one_out, two_out, out_bytes):
        for token in range(tokens):
            store_float(one_out + token * out_bytes, product(one, one_mask, x + token * x_bytes, words))
            store_float(two_out + token * out_bytes, product(two, two_mask, x + token * x_bytes, words))

    def unpack(values, mask, out, words, _table):
        for word in range(words):
            bits = load_mask(mask + 4 * word)
            for lane in range(32):
                weight = numpy.uint16(0)
                if bits >> numpy.uint32(lane) & numpy.uint32(1):
                    weight = load_half_word(values)
                    values += 2
                store_half_word(out + 64 * word + 2 * lane, weight)

    return rows, unpack


VARIANTS = (  # the fastest first
    Variant("avx512_bf16", frozenset({*AVX512, "avx512vbmi2", "avx512bf16"}), (torch.bfloat16,), torch.bfloat16,
            _avx512_bf16),
    Variant("avx512", frozenset({*AVX512, "avx2", "ssse3", "f16c"}), KINDS, torch.float32, _avx512),
    Variant("avx2", frozenset({"avx2", "ssse3", "fma", "f16c"}), KINDS, torch.float32, _avx2),
    Variant("plain", frozenset(), KINDS, torch.float32, _plain),
)  # fmt: skip

# What a job is made of: int64 each, addresses and counts.
NEXT, ROWS, CHUNK, WORDS, TOKENS, MASKS, VALUES, OFFSETS, X, OUT, TABLE, FIRST, X_BYTES, FIELDS = range(14)
COLUMNS, PLACES, BLOCKS = WORDS, MASKS, TABLE  # of a matrix that is Indexed
_JOB = types.void(types.int64)


def _by_chunks(work: Callable):
    """A C function of a job's address, which calls `work(job, begin, end)` for its rows. Any number of threads may run
    it at once: each takes a chunk of rows until there are none left.
    """
    work = njit(work)

    @cfunc(_JOB)
    def run(job):
        rows, chunk = load_long(job + 8 * ROWS), load_long(job + 8 * CHUNK)
        while True:
            begin = take(job + 8 * NEXT, chunk)
            if begin >= rows:
                break
            work(job, begin, min(begin + chunk, rows))

    return run


@functools.cache
def compiled_product(variant: Variant, kind: torch.dtype, at_once: int):
    """A C function of a job's address: out (TOKENS, ROWS) float32 of x (TOKENS, ...), `at_once` tokens at a time, of
    which TOKENS is a multiple.
    """
    both = njit(variant.make(kind, at_once)[0])

    def multiply(job, begin, end):
        rows, words, tokens = load_long(job + 8 * ROWS), load_long(job + 8 * WORDS), load_long(job + 8 * TOKENS)
        masks, values, offsets = load_long(job + 8 * MASKS), load_long(job + 8 * VALUES), load_long(job + 8 * OFFSETS)
        x, out, table = load_long(job + 8 * X), load_long(job + 8 * OUT), load_long(job + 8 * TABLE)
        x_bytes, half = load_long(job + 8 * X_BYTES), (end - begin + 1) // 2
        for i in range(begin, begin + half):  # each half is read in order, as caches expect it
            j = min(i + half, end - 1)
            one, two = values + 2 * load_long(offsets + 8 * i), values + 2 * load_long(offsets + 8 * j)
            one_mask, two_mask = masks + 4 * words * i, masks + 4 * words * j
            for token in range(0, tokens, at_once):  # the rows lie in the cache from the first on
                to, at = out + 4 * token * rows, x + token * x_bytes
                both(one, one_mask, two, two_mask, at, x_bytes, words, table, to + 4 * i, to + 4 * j, 4 * rows)

    return _by_chunks(multiply)


@functools.cache
def compiled_unpacking(variant: Variant, kind: torch.dtype):
    """Likewise: rows from FIRST on, into out (ROWS, 32 WORDS)."""
    unpack = njit(variant.make(kind, 1)[1])

    def expand(job, begin, end):
        masks, values, offsets = load_long(job + 8 * MASKS), load_long(job + 8 * VALUES), load_long(job + 8 * OFFSETS)
        first, out, table = load_long(job + 8 * FIRST), load_long(job + 8 * OUT), load_long(job + 8 * TABLE)
        words = load_long(job + 8 * WORDS)
        for i in range(begin, end):
            own, mask = values + 2 * load_long(offsets + 8 * (first + i)), masks + 4 * words * (first + i)
            unpack(own, mask, out + 64 * words * i, words, table)

    return _by_chunks(expand)


@functools.cache
def compiled_indexed_product(kind: torch.dtype, block_bytes: int, at_once: int):
    """As `compiled_product`, of a matrix that is Indexed; x is float32."""
    lanes, sums, load_block = vectors.of(QUAD), vectors.of_quads(at_once), _load_block(block_bytes)
    zero, add, store, load_values, widen = sums.zero, sums.add, sums.store, lanes.load, getattr(lanes, _name(kind))

    def multiply(job, begin, end):
        values, places, blocks = load_long(job + 8 * VALUES), load_long(job + 8 * PLACES), load_long(job + 8 * BLOCKS)
        rows, tokens, offsets = load_long(job + 8 * ROWS), load_long(job + 8 * TOKENS), load_long(job + 8 * OFFSETS)
        x, out, x_bytes = load_long(job + 8 * X), load_long(job + 8 * OUT), load_long(job + 8 * X_BYTES)
        for i in range(begin, end):
            first, last = types.int64(load_mask(offsets + 4 * i)), types.int64(load_mask(offsets + 4 * i + 4))
            for token in range(0, tokens, at_once):
                row, at = zero(), x + token * x_bytes
                for quad in range(first, last):
                    weights = widen(load_values(values + 2 * QUAD * quad))
                    block = at + 4 * BLOCK * types.int64(load_block(blocks + block_bytes * quad))
                    row = add(row, weights, places + QUAD * quad, block, x_bytes)
                store(row, out + 4 * token * rows + 4 * i, 4 * rows)

    return _by_chunks(multiply)


@functools.cache
def compiled_indexed_unpacking(block_bytes: int):
    """As `compiled_unpacking`, into out (ROWS, COLUMNS)."""
    load_block = _load_block(block_bytes)

    def expand(job, begin, end):
        values, places, blocks = load_long(job + 8 * VALUES), load_long(job + 8 * PLACES), load_long(job + 8 * BLOCKS)
        offsets, first, out = load_long(job + 8 * OFFSETS), load_long(job + 8 * FIRST), load_long(job + 8 * OUT)
        columns = load_long(job + 8 * COLUMNS)
        for i in range(begin, end):
            to, row = out + 2 * columns * i, offsets + 4 * (first + i)
            for column in range(columns):
                store_half_word(to + 2 * column, numpy.uint16(0))
            for quad in range(types.int64(load_mask(row)), types.int64(load_mask(row + 4))):
                block = to + 2 * BLOCK * types.int64(load_block(blocks + block_bytes * quad))
                for lane in range(QUAD * quad, QUAD * quad + QUAD):
                    value = load_half_word(values + 2 * lane)
                    if value:  # what fills a quad has a place that may be another's
                        store_half_word(block + 2 * types.int64(load_byte(places + lane)), value)

    return _by_chunks(expand)


def _load_block(size: int) -> Callable:
    """What reads a block's number of so many bytes."""
    return load_byte if size == 1 else load_mask


def shuffles() -> numpy.ndarray:
    """(256, 16) uint8: for each mask of 8 weights, which byte of 8 packed values goes where; 128 is a zero."""
    table = numpy.full((256, 8, 2), 128, dtype=numpy.uint8)
    for mask in range(256):
        lanes = [lane for lane in range(8) if mask >> lane & 1]
        for place, lane in enumerate(lanes):
            table[mask, lane] = 2 * place, 2 * place + 1
    return table.reshape(256, 16)
