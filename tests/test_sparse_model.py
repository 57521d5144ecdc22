"""Models without their zeros: kernels against float64, every architecture against its dense self, what stays dense."""

import copy
import importlib.util
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys

import forking
import pyarrow
import pytest
import torch
import torch.nn.functional as F
import transformers
from functorch.compile import make_boxed_func
from safetensors.torch import save_file
from shared import ROOT
from test_architectures import is_tied
from test_bad_input import save_tokenizer
from tiny import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lib import LanguageModel, RunError, save_checkpoint, sparse_model
from lib.results.checkpoint import compressed_size
from lib.sparse import SparseLinear, choice, convert, cpu, cuda, format, indexed, kernels, pack, sliced, threads
from lib.sparse.indexed import pack_indexed
from lib.sparse.linear import PACK
from lib.sparse.sliced import pack_sliced

HAS = cpu.features()
CASES = [(variant, kind) for variant in kernels.VARIANTS for kind in variant.kinds]


def sparse_matrix(rows: int, columns: int, kind: torch.dtype, sparsity: float = 0.6) -> torch.Tensor:
    """With one row of zeros and one of none, where there are so many."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).to(kind)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    if rows > 4:
        weight[2], weight[3] = 0, 1
    return weight


def prune(model: LanguageModel, sparsity: float = 0.6) -> LanguageModel:
    """Random zeros, and values that bfloat16 holds, so that packing changes none."""
    generator = torch.Generator().manual_seed(0)
    for matrix in model.matrices:
        weight = matrix.weight.bfloat16().to(matrix.weight.dtype)
        matrix.write(weight.masked_fill(torch.rand(matrix.shape, generator=generator) < sparsity, 0))
    return model


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{str(case[1]).removeprefix('torch.')}")
def kind(request, monkeypatch) -> torch.dtype:
    """A kind of values, on a processor that has no more than a variant of the kernel needs."""
    variant, kind = request.param
    if not variant.needs <= HAS:
        pytest.skip(f"needs {', '.join(sorted(variant.needs - HAS))}")
    monkeypatch.setattr(cpu, "features", lambda: variant.needs)
    assert cpu.variant_for(kind) is variant
    return kind


@pytest.fixture
def said(caplog, monkeypatch):
    """The project's log."""
    monkeypatch.setattr(logging.getLogger("lib"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lib")
    return caplog


def check_products(packed, weight: torch.Tensor, *given: tuple[int, torch.dtype]) -> None:
    """By the kernel and unpacked, of so many tokens of a dtype each, against float64."""
    for tokens, dtype in given:
        x = torch.randn(tokens, weight.shape[1]).to(dtype)
        exact = x.double() @ weight.double().T
        size = float((x.double().abs() @ weight.double().abs().T).max()) + 1e-9
        assert float((cpu.multiply(packed, x) - exact).abs().max()) < 1e-5 * size
        rounding = 1e-5 if dtype == torch.float32 else 1e-2
        assert float((cpu.product(packed, x) - exact).abs().max()) < rounding * size


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 32), (33, 100)], ids=str)
def test_products(kind, shape, monkeypatch):
    """Of one token and of several, by the kernel and unpacked, whatever their dtype; strips of two rows."""
    weight = sparse_matrix(*shape, kind)
    packed = pack(weight)
    assert torch.equal(packed.dense(), weight)
    monkeypatch.setattr(cpu, "STRIP", 2 * packed.words * 32)
    check_products(packed, weight, (1, kind), (3, torch.float32))


@pytest.mark.parametrize("kind", format.KINDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (7, 1100), (3, 70_000)], ids=str)
def test_products_by_columns(shape, sparsity, kind, monkeypatch):
    """As above; one that is wider has block numbers of more than a byte."""
    weight = sparse_matrix(*shape, kind, sparsity)
    monkeypatch.setattr(cpu, "STRIP", 2 * shape[1])
    check_products(pack_indexed(weight), weight, (1, kind), (3, torch.float32), (17, kind))


def test_by_columns_what_is_not_finite_reaches_who_has_a_weight_for_it():
    weight, x = sparse_matrix(9, 70, torch.bfloat16), torch.ones(2, 70)
    x[0, 5] = float("inf")
    found = cpu.multiply(pack_indexed(weight), x)
    assert torch.equal(~found[0].isfinite(), weight[:, 5] != 0)
    assert found[1].isfinite().all()


def test_what_is_not_finite_passes_as_in_a_dense_product(kind):
    weight = sparse_matrix(9, 70, kind)
    for value in (float("inf"), float("-inf"), float("nan")):
        x = torch.ones(1, 70)
        x[0, 5] = value
        dense = F.linear(x, weight.float())
        assert not dense.isfinite().all()
        found = cpu.multiply(pack(weight), x)
        assert torch.equal(found.isnan(), dense.isnan())
        assert torch.equal(found[found.isinf()], dense[dense.isinf()])


def test_values_of_32_bits_are_rounded_as_little_as_16_can():
    weight = torch.tensor([[1.0, 0.0, 1 + 2**-10], [2.0**-3, 3.0, 0.0]])
    assert pack(weight).kind == torch.float16  # holds them; bfloat16 does not
    assert torch.equal(pack(weight).dense().float(), weight)
    large = torch.tensor([[1e5, 0.0, 3.0]])  # beyond float16
    assert pack(large).kind == torch.bfloat16
    assert pack(torch.eye(3)).kind == torch.bfloat16  # both hold them


def test_size():
    packed = pack(sparse_matrix(512, 1024, torch.bfloat16, 0.7))
    assert packed.bytes / (512 * 1024) == pytest.approx(format.bytes_per_weight(packed.sparsity), abs=0.02)


NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("kind", format.KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 100), (5, 256), (7, 1100), (3, 70_000)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95, 1.0])
def test_weights_with_their_columns(shape, sparsity, kind, monkeypatch):
    """Every weight is told with its column; what fills a quad is nothing. Rows are packed a few at a time."""
    monkeypatch.setattr(indexed, "STRIP", 2 * shape[1])
    weight = sparse_matrix(*shape, kind, sparsity)
    weight[0, -1] = float("nan")
    packed, other = pack_indexed(weight), pack(weight)
    assert torch.equal(packed.dense().view(torch.int16), weight.view(torch.int16))
    assert (packed.rows, packed.columns, packed.kind) == (*shape, kind)
    assert packed.sparsity == pytest.approx(other.sparsity)
    assert packed.blocks.dtype == (torch.uint8 if shape[1] <= 256 * 256 else torch.int32)
    filling = packed.values.numel() - int(packed.values.count_nonzero())
    assert filling <= 3 * shape[0] * -(-shape[1] // 256)


def unpacked_by_hand(packed: sliced.Sliced) -> torch.Tensor:
    """One lane after the other, one weight after the other."""
    found = torch.zeros(packed.rows, packed.columns, dtype=torch.int16)
    for slice_, starts in enumerate(packed.starts.tolist()):
        begin, end = packed.offsets[slice_ : slice_ + 2].tolist()
        for lane, column in enumerate(starts):
            for group in range(begin, end):
                for step in range(8):
                    column += int(packed.gaps[group, lane]) >> 4 * step & 15
                    value = int(packed.values[group, step // 2, lane]) >> 16 * (step % 2) & 0xFFFF
                    if value:
                        row = packed.order[slice_ * 16 + lane % 16]
                        assert found[row, column] == 0
                        found[row, column] = value - (value >> 15 << 16)
    return found.view(packed.kind)


@pytest.fixture(params=[1, 4, 64])
def parts(request, monkeypatch) -> int:
    """Of a row, whatever its length."""
    monkeypatch.setattr(sliced, "_parts", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("kind", format.KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 100), (37, 70), (16, 1100)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95, 1.0])
def test_what_a_gpu_multiplies_by(shape, sparsity, kind, parts, monkeypatch):
    """Every weight, once; gaps wider than 15 are bridged. Rows are packed a slice at a time."""
    monkeypatch.setattr(sliced, "STRIP", 16 * shape[1])
    weight = sparse_matrix(*shape, kind, sparsity)
    weight[0, -1] = float("nan")
    packed = pack_sliced(weight)
    for found in (packed.dense(), unpacked_by_hand(packed)):
        assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
    assert (packed.rows, packed.columns, packed.kind) == (*shape, kind)
    assert packed.starts.shape == (-(-shape[0] // 16), 16 * parts)
    assert packed.sparsity == pytest.approx(pack(weight).sparsity)


def test_values_of_32_bits_are_rounded_alike():
    weight = sparse_matrix(9, 300, torch.float32)
    for other in (pack_indexed, pack_sliced):
        assert other(weight).kind == pack(weight).kind
        assert torch.equal(other(weight).dense(), pack(weight).dense())


def test_size_by_columns():
    packed = pack_indexed(sparse_matrix(512, 4096, torch.bfloat16, 0.7))
    filling = 1.5 / 256  # half of what a quad may lack, in each block
    expected = (1 - packed.sparsity + filling) * (2 + 1 + 1 / 4)
    assert packed.bytes / (512 * 4096) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_size_on_a_gpu(sparsity):
    """2.5 bytes a weight, and some for bridges, rows longer than others, and what a group may lack."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator).bfloat16()
    weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    packed = pack_sliced(weight)
    assert packed.starts.shape[1] == 16 * {0.5: 64, 0.7: 32, 0.9: 32}[sparsity]
    ideal = 2.5 * (1 - packed.sparsity)
    assert ideal < packed.bytes / weight.numel() < {0.5: 1.2, 0.7: 1.15, 0.9: 1.8}[sparsity] * ideal


@NEEDS_TRITON
@pytest.mark.parametrize("kind", format.KINDS, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="script/gpu_check.py runs it on the GPU")
def test_gpu_kernels(kind, parts):
    """On the CPU, by Triton's interpreter; rows of the second shape have several groups, and are in two slices."""
    from lib.sparse import gpu_kernel

    for shape in ((1, 1), (19, 300)):
        weight, x = sparse_matrix(*shape, kind), torch.randn(2, shape[1]).to(kind)
        weight[0, 0] = -1
        packed, exact = pack_sliced(weight), x.double() @ weight.double().T
        assert torch.equal(gpu_kernel.unpack(packed.tensors, shape[1]).view(kind), weight)
        rounded = cuda.multiply(packed, x)  # which the interpreter does towards zero
        assert rounded.dtype == kind
        torch.testing.assert_close(rounded.double(), exact, rtol=0.01, atol=0.01)
        torch.testing.assert_close(cuda.multiply(packed, x.float()).double(), exact, rtol=1e-4, atol=1e-4)
        found = cuda.multiply(packed, x.float()[1:])  # a row that begins anywhere
        torch.testing.assert_close(found.double(), exact[1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cuda.multiply(packed, x.double()).double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cuda.product(packed, x).double(), exact, rtol=0.02, atol=0.02)
    x[0, 3] = float("inf")
    found = cuda.multiply(packed, x).isfinite()
    assert not found[0, weight[:, 3] != 0].any()
    assert found[1].all()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lib.sparse import gpu_kernel
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}  # as torch's memory is
held = dict(values="*i32", gaps="*i32", starts="*i32", offsets="*i32", order="*i32")
sizes = dict(rows="i32", columns="i32", PARTS="constexpr")
for kind in ("bf16", "fp16", "fp32"):
    types = held | dict(x=f"*{kind}", out=f"*{kind}") | sizes | dict(STEPS="constexpr", IS_BFLOAT16="constexpr")
    constants = dict(PARTS=64, STEPS=gpu_kernel.STEPS, IS_BFLOAT16=kind == "bf16")
    source = ASTSource(gpu_kernel._multiply, types, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=32))
    print(kind, "cubin" in made.asm, made.metadata.shared)
source = ASTSource(gpu_kernel._unpack, held | dict(out="*i16") | sizes, dict(PARTS=64), aligned)
made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=32))
print("unpack", "cubin" in made.asm, made.metadata.shared)
"""


@NEEDS_TRITON
def test_gpu_kernels_compile(tmp_path):
    """For a card that need not be there: the interpreter takes what the compiler refuses."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # Through shared memory goes the sum of a row's parts alone.
    assert done.stdout.splitlines() == ["bf16 True 2048", "fp16 True 2048", "fp32 True 2048", "unpack True 0"]


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter stands for a GPU")
def test_a_layer_that_is_moved_is_packed_anew(monkeypatch):
    """To a GPU and back; on a machine without one, where the GPU is told by a flag."""
    from lib.sparse import linear

    weight, bias, x = sparse_matrix(9, 300, torch.float16), torch.ones(9), torch.randn(2, 300)
    layer = SparseLinear(pack(weight), bias, torch.float16)
    layer.half()
    assert isinstance(layer.packed, format.Packed)
    expected = layer(x)
    monkeypatch.setattr(linear, "forms_for", lambda _tensor: (sliced.Sliced,))
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)  # moved past it, one tensor at a time
    layer.to("cpu")
    assert isinstance(layer.packed, sliced.Sliced)
    assert {*dict(layer.named_buffers())} == {"values", "gaps", "starts", "offsets", "order"}
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=1e-2, atol=1e-2)
    assert not layer.state_dict().keys() - {"weight", "bias"}
    monkeypatch.undo()
    layer.register_buffer("another", torch.ones(1))
    layer.float()
    assert isinstance(layer.packed, format.Packed)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.another, torch.ones(1))


def test_threads(monkeypatch):
    """As many as torch has, of its own pool or, where there is none to be had, of Python's."""
    weight, x = sparse_matrix(50, 64, torch.bfloat16), torch.randn(1, 64)
    packed, before, counts = pack(weight), torch.get_num_threads(), []
    of_torch = threads._of_torch()
    one = cpu.multiply(packed, x)
    try:
        torch.set_num_threads(2)
        if of_torch:
            monkeypatch.setattr(
                threads, "_of_torch", lambda: lambda *given: (counts.append(given[2]), of_torch(*given))
            )
            assert torch.equal(cpu.multiply(packed, x), one)
            assert counts == [2]
        monkeypatch.setattr(threads, "_of_torch", lambda: None)
        assert torch.equal(cpu.multiply(packed, x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path, said):
    """From memory and from disk the dense pruned model's logits, for a prompt and for a token, and its text."""
    hf, tokens = tiny_model(architecture), tiny_tokens(2, 12)
    model, tied = prune(LanguageModel(hf)), is_tied(hf)
    one = tokens[:1, :1]
    with torch.no_grad():
        dense = [hf(given, use_cache=False).logits for given in (tokens, one)]
        text = hf.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    save_checkpoint(model, tmp_path)
    fused = {m.name for m in model.matrices if m.expert is not None}
    for which in (str(tmp_path), model):
        said.clear()
        sparse = sparse_model(which, dtype="float32", threshold=0.5)
        layers = {id(m): m for m in sparse.modules() if isinstance(m, SparseLinear)}
        assert len(layers) == len(model.matrices) - len(fused)
        assert ("several experts" in said.text) == bool(fused)
        assert not any(p.is_meta for p in (*sparse.parameters(), *sparse.buffers()))
        assert is_tied(sparse) == tied
        with torch.no_grad():
            for given, expected in zip((tokens, one), dense, strict=True):
                torch.testing.assert_close(sparse(given, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(sparse.generate(tokens[:1], max_new_tokens=4, do_sample=False), text)


def test_only_one_block_has_its_dense_matrices(tmp_path, monkeypatch):
    save_checkpoint(prune(LanguageModel(tiny_model("llama"))), tmp_path)
    seen = []

    def converted(matrix, real=convert._converted, **given):
        opened = convert_model.matrices
        seen.append({m.block for m in opened if not m.stored.is_meta} - {matrix.block})
        return real(matrix, **given)

    def open_model(*given, real=convert.open_model):
        nonlocal convert_model
        convert_model = real(*given)
        return convert_model

    convert_model = None
    monkeypatch.setattr(convert, "open_model", open_model)
    monkeypatch.setattr(convert, "_converted", converted)
    sparse_model(tmp_path, threshold=0.5)
    assert len(seen) == 21
    assert not set().union(*seen)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate(cache):
    hf, tokens = tiny_model("llama"), tiny_tokens(3, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    expected = prune(LanguageModel(hf)).model.generate(tokens, **options)
    sparse = sparse_model(hf, threshold=0.5)
    assert torch.equal(sparse.generate(tokens, **options), expected)
    assert sparse_model(sparse) is sparse
    with pytest.raises(RunError, match="without its zeros"):
        LanguageModel(sparse)


def test_16_bits():
    hf, tokens = tiny_model("llama").bfloat16(), tiny_tokens(2, 12)
    prune(LanguageModel(hf))
    with torch.no_grad():
        exact = copy.deepcopy(hf).float()(tokens).logits
        sparse = sparse_model(hf, threshold=0.5)
        assert sparse.dtype == torch.bfloat16
        assert (sparse(tokens).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
        assert (sparse(tokens[:1, :1]).logits.float() - exact[:1, :1]).abs().max() < 0.05 * exact.abs().max()


def test_a_layer_is_saved_as_an_ordinary_one(tmp_path):
    for architecture in ("llama", "gpt2"):
        hf, tokens = tiny_model(architecture), tiny_tokens(2, 12)
        model = prune(LanguageModel(hf))
        before = {name: value.clone() for name, value in hf.state_dict().items()}
        sparse = sparse_model(model, threshold=0.5)
        after = sparse.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        sparse.save_pretrained(tmp_path / architecture)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / architecture).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, sparse(tokens).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_a_model_scales_are_scaled():
    hf, tokens = tiny_model("rwkv", num_hidden_layers=6, rescale_every=2), tiny_tokens(1, 12)
    model = prune(LanguageModel(hf))
    with torch.no_grad():
        expected = copy.deepcopy(hf)(tokens, use_cache=False).logits
        found = sparse_model(model, threshold=0.5)(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_inputs():
    weight = sparse_matrix(8, 40, torch.bfloat16).float()
    layer, x = SparseLinear(pack(weight), torch.ones(8), torch.float32), torch.randn(3, 40, requires_grad=True)
    layer(x).square().sum().backward()
    own = x.detach().clone().requires_grad_()
    F.linear(own, weight, torch.ones(8)).square().sum().backward()
    torch.testing.assert_close(x.grad, own.grad)


@pytest.mark.parametrize("form", [pack, pack_indexed, pack_sliced])
def test_compilers_take_the_product_as_it_is(form):
    """For a token and for many, with the packed matrix that a CPU or a GPU has; a gradient is by the whole matrix."""
    torch._dynamo.reset()  # which compiles a function so many times and no more
    weight, seen = sparse_matrix(8, 40, torch.bfloat16).float(), []
    layer = SparseLinear(form(weight), torch.ones(8), torch.float32)

    def backend(graph, _inputs):
        seen.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    own = torch.ops.alphapruning.multiply.default
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    for x in (torch.randn(1, 40), torch.randn(2, 3, 40)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), F.linear(x, weight, torch.ones(8)))
        assert own in seen.pop()
    tangent = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,))[1], backend="eager")(x)
    torch.testing.assert_close(tangent, F.linear(x, weight))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert own not in seen.pop()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
    given = type(layer.packed).__name__, layer.packed.tensors, torch.randn(1, 40), 8, 40, layer.kind, 1
    torch.library.opcheck(own, given, test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_model_writes_the_same_text():
    hf, tokens = tiny_model("llama"), tiny_tokens(1, 6)
    prune(LanguageModel(hf))
    asked = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = hf.generate(tokens, **asked)
    sparse, seen = sparse_model(hf, threshold=0.5), []

    def backend(graph, _inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    sparse.forward = torch.compile(sparse.forward, backend=backend)
    assert torch.equal(sparse.generate(tokens, **asked), expected)
    assert torch.ops.alphapruning.multiply.default in seen
    assert not sparse.generation_config.disable_compile  # transformers would compile it on cuda


@pytest.mark.parametrize("form", [pack, pack_indexed, pack_sliced])
def test_on_another_device_than_its_tokens(form):
    """What is on meta has shapes; else torch says what is wrong."""
    layer = SparseLinear(form(sparse_matrix(8, 40, torch.bfloat16)), torch.ones(8), torch.float32)
    assert layer.to("meta")(torch.ones(2, 40, device="meta")).shape == (2, 8)
    assert layer.state_dict()["weight"].shape == layer.weight.shape == (8, 40)
    assert "sparsity=unknown" in repr(layer)
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 40))


@pytest.mark.parametrize("faster", [True, False])
def test_what_does_not_pay_stays_dense(faster, monkeypatch, said):
    """Measured once for a shape; sparser matrices of it, where it paid, need no measurement of their own."""
    measured = []

    def alternating(*_):
        measured.append(True)
        return (2.0, 1.0) if faster else (1.0, 2.0)

    monkeypatch.setattr(choice, "_alternating", alternating)
    monkeypatch.setattr(choice, "_known", {})
    hf = tiny_model("llama")
    sparse_model(prune(LanguageModel(hf)))
    found = [m for m in hf.modules() if isinstance(m, SparseLinear)]
    shapes = 4  # q and o; k and v; gate and up; down
    assert len(found) == (21 if faster else 0)
    assert ("stay dense, as fast with their zeros: model.layers.*" in said.text) == (not faster)
    assert all(layer.max_tokens == 1 for layer in found)  # of several tokens, the second way was the faster
    assert all(isinstance(layer.packed, indexed.Indexed) for layer in found)  # and of two forms, the second
    assert shapes <= len(measured) <= 2 * 2 * shapes


def test_a_form_holds_for_sparser_matrices_where_it_is_the_one_for_many_zeros(monkeypatch):
    """Masks are the faster at 50 %, columns at 80; measured again at 70, and at 90 no more."""
    measured = []

    def measured_by(make, weight, _compiled):
        measured.append(round(float((weight == 0).float().mean()), 1))
        return make(indexed.Indexed if measured[-1] >= 0.8 else format.Packed), 4

    monkeypatch.setattr(choice, "_measured", measured_by)
    monkeypatch.setattr(choice, "_known", {})
    found = []
    for zeros in (5, 8, 7, 9, 5):
        weight = torch.ones(4, 10).bfloat16()
        weight[:, :zeros] = 0
        layer = choice.fastest(lambda form, w=weight: SparseLinear(PACK[form](w), None, torch.bfloat16), weight)
        found.append(type(layer.packed))
        assert layer.max_tokens == 4
    assert found == [format.Packed, indexed.Indexed, format.Packed, indexed.Indexed, format.Packed]
    assert measured == [0.5, 0.8, 0.7]


@pytest.mark.parametrize(("faster", "threshold", "packed"), [(True, None, 21), (False, None, 0), (False, 0.4, 21)])
def test_two_of_four_is_left_to_torch_where_it_pays(faster, threshold, packed, monkeypatch, said):
    """On a pretended GPU: torch's tensors take ten times as long as dense for one token on some."""
    made, compared = [], []

    def semi_structured(module, weight):
        made.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        made[-1].weight = nn.Parameter(weight.clone(), requires_grad=False)
        return made[-1]

    def alternating(*_):
        compared.append(True)
        return (2.0, 1.0) if faster else (1.0, 2.0)

    monkeypatch.setattr(cuda, "is_two_of_four", lambda _weight: True)
    monkeypatch.setattr(cuda, "semi_structured", semi_structured)
    monkeypatch.setattr(choice, "_alternating", alternating)
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_pays", {})
    hf, tokens = tiny_model("llama"), tiny_tokens(1, 9)
    model = prune(LanguageModel(hf))
    with torch.no_grad():
        expected = hf(tokens).logits
        found = sparse_model(model, threshold=threshold)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(module in made for module in hf.modules()) == packed
    assert not any(isinstance(module, SparseLinear) for module in hf.modules())
    assert ("stay dense, as fast with their zeros: model.layers.*" in said.text) == (not packed)
    assert bool(compared) == (threshold is None)


def test_a_model_that_is_not_sparse_is_said_to_be_so(said):
    hf = tiny_model("llama")
    sparse_model(hf)
    assert "LlamaForCausalLM is not sparse (0.0 % of its prunable weights are zero): it stays dense" in said.text
    assert not any(isinstance(module, SparseLinear) for module in hf.modules())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_do_more_stay(said):
    hf, tokens = tiny_model("llama"), tiny_tokens(1, 9)
    model = prune(LanguageModel(hf))
    first, second, third = (m.module for m in model.matrices[:3])
    first.__class__ = Scaled
    second.register_forward_hook(lambda _module, _args, output: output + 1)
    with torch.no_grad():
        expected = hf(tokens).logits
        found = sparse_model(model, threshold=0.5)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "2 stay dense, as their layers do more than multiply" in said.text
    assert third not in set(hf.modules())


def test_a_folder_that_is_none():
    with pytest.raises(RunError, match="--model"):
        sparse_model("./no/such/folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned checkpoint with a tokenizer."""
    out = tmp_path_factory.mktemp("pruned")
    model = prune(LanguageModel(tiny_model("llama")), 0.8)
    save_checkpoint(model, out)
    save_tokenizer(out)
    return out


@pytest.mark.parametrize("more", [[], ["--static"]])
def test_generate_compares(folder, more):
    flags = ["--prompt", "w1 w2 w3", "--max_new_tokens", "5", "--compare", "--device", "cpu"]
    done = forking.run("script/generate.py", ["--model", str(folder), *flags, *more])
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == second  # the text
    assert first.startswith("w")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(("| s", "| d"))]
    assert [row[0] for row in rows] == ["sparse", "dense"]
    assert all(float(value) >= 0 for row in rows for value in row[1:])
    assert re.search(r"(79|80)\.\d % zeros", done.stderr)


def test_one_token_has_no_rate_and_an_unknown_one_is_refused(folder, tmp_path):
    script = runpy.run_path(str(ROOT / "script/generate.py"))
    options = {"model": str(folder), "device": "cpu"}
    table = script["generate"](script["GenerateFlags"](**options, prompt="w1 w2", max_new_tokens=1))
    row = next(line for line in table.splitlines() if line.startswith("| sparse"))
    assert row.split("|")[3].strip() == "nan"
    save_tokenizer(shutil.copytree(folder, tmp_path / "beyond"), first=60)
    options["model"] = str(tmp_path / "beyond")
    with pytest.raises(RunError, match="its tokenizer gives tokens beyond the 96 that the model has"):
        script["generate"](script["GenerateFlags"](**options, prompt="w1 w50", max_new_tokens=1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "w1"], "--model"),
        (["--model", "no/such/place/at/all", "--prompt", "w1"], "--model no/such/place/at/all: neither"),
        (["--model", "{}", "--prompt", ""], "--prompt: has no token"),
        (["--model", "{}", "--prompt", "w1", "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["--model", "{}", "--prompt", "w1", "--max_new_tokens", "64"], "--prompt: its 1 tokens and --max_new_tokens"),
        (["--model", "{}", "--prompt", "w1", "--dense", "--compare"], "--compare: does what --dense does"),
        (["--model", "{}", "--prompt", "w1", "--device", "tpu"], "--device: 'tpu' is unknown"),
        (["--model", "{}", "--prompt", "w1", "--dtype", "int8"], "--dtype: 'int8' is unknown"),
    ],
)
def test_errors_of_generate_are_one_line(folder, flags, message):
    done = forking.run("script/generate.py", [flag.format(folder) for flag in flags])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("script/generate.py: error: ")
    assert message in line
    assert done.stdout == ""


def test_compressed_size(tmp_path):
    """Of samples as of the whole, for a file of 20 MB."""
    torch.manual_seed(0)
    weights = {f"w{i}": F.dropout(torch.randn(1000, 1000).bfloat16(), 0.1 * i) for i in range(10)}
    save_file(weights, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    whole = pyarrow.Codec("zstd", compression_level=3).compress(data).size
    size, compressed = compressed_size(tmp_path)
    assert size == len(data)
    assert compressed == pytest.approx(whole, rel=0.05)


# ---------------------------------------------------------------- what others do with such a layer


def float32_layer(size: int = 64, bias: bool = False) -> SparseLinear:
    return SparseLinear(pack(torch.eye(size)), torch.ones(size) if bias else None, torch.float32)


def test_prompts_after_inference_mode():
    """The memory that strips are unpacked into serves every layer of the thread, in whatever mode."""
    layer, x = float32_layer(67), torch.randn(3, 67)
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x)


def test_what_writes_to_the_weight_changes_the_layer():
    layer, ones = float32_layer(4), torch.ones(1, 4)
    layer.weight.data.copy_(3 * torch.eye(4))
    assert layer(ones).tolist() == [[3.0] * 4]
    layer.weight[0] = 0
    assert layer(ones).tolist() == [[0.0, 3, 3, 3]]
    torch.mul(layer.weight, 2, out=layer.weight)
    assert layer(ones).tolist() == [[0.0, 6, 6, 6]]
    layer.weight.mul_(0.5)
    assert layer(ones).tolist() == [[0.0, 3, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_is_that_of_an_ordinary_layer(dtype):
    layer = float32_layer(bias=True).to(dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert layer.weight.dtype == dtype
    assert float32_layer().to("cpu").weight.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_a_model_loads_its_own_state_and_that_of_a_dense_one(architecture):
    dense, tokens = prune(LanguageModel(tiny_model(architecture))), tiny_tokens(2)
    sparse = sparse_model(copy.deepcopy(dense.model), threshold=0.5)
    other = sparse_model(prune(LanguageModel(tiny_model(architecture, seed=1))), threshold=0.5)
    with torch.no_grad():
        expected = sparse(tokens).logits
        for state in (sparse.state_dict(), dense.model.state_dict()):
            other(tokens)
            other.load_state_dict(state)
            assert torch.equal(other(tokens).logits, expected)
    layer = next(layer for layer in sparse.modules() if isinstance(layer, SparseLinear))
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "weight"})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(layer.state_dict() | {"weight": torch.zeros(3, 5)})


def test_two_models_at_once():
    tokens, models = tiny_tokens(2), [prune(LanguageModel(tiny_model("llama", seed=seed))) for seed in (0, 1)]
    with torch.no_grad():
        expected = [model.model(tokens).logits for model in models]
        sparse = [sparse_model(model, threshold=0.5) for model in models]
        for _ in range(2):
            for model, logits in zip(sparse, expected, strict=True):
                torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_infinity_by_columns_stays_where_there_are_weights():
    weight = sparse_matrix(9, 300, torch.bfloat16, 0.7)
    weight[:, (0, 256)], weight[3, 0] = 0, 1
    for column in (0, 256):
        x = torch.randn(1, 300)
        x[0, column] = torch.inf
        finite = cpu.multiply(pack_indexed(weight), x)[0].isfinite()
        assert torch.equal(finite, weight[:, column] == 0)


def test_an_infinite_weight_does_not_choose_the_values_type():
    weight = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert pack(weight).kind == torch.float16
    weight[0, 0] = torch.inf
    assert pack(weight).kind == torch.float16
    weight[0, 1] = 1e6  # beyond float16's range
    assert pack(weight).kind == torch.bfloat16


def test_devices_and_types_as_torch_has_them(tmp_path):
    model = prune(LanguageModel(tiny_model("llama")))
    save_checkpoint(model, tmp_path)
    made = sparse_model(tmp_path, device=torch.device("cpu"), threshold=0.5)
    assert made.dtype == torch.float32
    assert sparse_model(tmp_path, device="cpu", dtype=torch.bfloat16, threshold=0.5).dtype == torch.bfloat16
    with pytest.raises(RunError, match="--dtype: 'foo' is unknown"):
        sparse_model(tmp_path, device="cpu", dtype="foo")
    with pytest.raises(RunError, match=r"threshold 50: must lie in \[0, 1\]"):
        sparse_model(tmp_path, device="cpu", threshold=50)
