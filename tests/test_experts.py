"""Mixtures in every layout: what is an expert, what is a router, and what each expert reads, worked out by hand."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens
from torch import nn
from torch.nn.functional import silu
from transformers.pytorch_utils import Conv1D

from lib import LanguageModel, RunError
from lib.collector import matrix_inputs
from lib.experts import Mixtures
from lib.model import Matrix
from lib.products import Products
from lib.sequential import walk


def first_block(hf: nn.Module, watched: nn.Module) -> tuple[dict, tuple]:
    """Statistics of the first block's matrices, and the arguments that `watched`, inside it, was called with."""
    model, tokens, calls = LanguageModel(hf), tiny_tokens(), []
    step = next(walk(model, tokens, "gram", batch_size=len(tokens)))
    hook = watched.register_forward_pre_hook(lambda _m, args: calls.append(args))
    with torch.no_grad():
        hf(tokens, use_cache=False)
    hook.remove()
    return step.stats, calls[0]


def assert_reads(stats: dict, name: str, x: torch.Tensor) -> None:
    x = x.double()
    assert stats[name].tokens == len(x)
    torch.testing.assert_close(stats[name].gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_experts_as_batched_products():
    """Llama 4: (experts, in, out), every expert given all tokens, scaled by its router's score."""
    hf = tiny_model("llama4")
    experts = hf.model.layers[0].feed_forward.experts
    stats, (hidden,) = first_block(hf, experts)
    for e, x in enumerate(hidden.double().view(4, -1, 32)):
        gate, up = (x @ experts.gate_up_proj[e].double()).chunk(2, dim=-1)
        assert_reads(stats, f"model.layers.0.feed_forward.experts.gate_up_proj.{e}", x)
        assert_reads(stats, f"model.layers.0.feed_forward.experts.down_proj.{e}", up * silu(gate))


def test_experts_merged_into_two_dimensions():
    """DBRX: (experts * ffn, hidden), of which the last is used as (in, out)."""
    hf = tiny_model("dbrx")
    experts = hf.transformer.blocks[0].ffn.experts
    w1, v1 = (p.detach().double().view(4, 48, 32) for p in (experts.mlp.w1, experts.mlp.v1))
    stats, (hidden, chosen, _) = first_block(hf, experts)
    hidden, chosen = hidden.reshape(-1, 32).double(), chosen.reshape(-1, 2)
    prefix = "transformer.blocks.0.ffn.experts.mlp"
    for e in range(4):
        x = hidden[(chosen == e).any(-1)]
        assert_reads(stats, f"{prefix}.w1.{e}", x)
        assert stats[f"{prefix}.w1.{e}"] is stats[f"{prefix}.v1.{e}"]
        assert_reads(stats, f"{prefix}.w2.{e}", silu(x @ w1[e].T) * (x @ v1[e].T))
    shapes = {m.name.split(".")[-2]: m.shape for m in LanguageModel(hf).matrices_of(0) if m.expert == 1}
    assert shapes == {"w1": (48, 32), "v1": (48, 32), "w2": (32, 48)}


def test_parallel_linear_layers():
    """JetMoe: a linear map with an expert axis, whose inputs come sorted by expert."""
    hf = tiny_model("jetmoe")
    stats, (x, sizes) = first_block(hf, hf.model.layers[0].mlp.output_linear)
    for e, part in enumerate(x.split(sizes)):
        assert_reads(stats, f"model.layers.0.mlp.output_linear.weight.{e}", part)


def test_experts_with_biases_and_interleaved_gates():
    """GPT-OSS: (experts, in, out), gates and what they open in turn."""
    hf = tiny_model("gpt_oss")
    experts = hf.model.layers[0].mlp.experts
    stats, (hidden, chosen, _) = first_block(hf, experts)
    for e in range(4):
        x = hidden.reshape(-1, 32).double()[(chosen == e).any(-1)]
        both = x @ experts.gate_up_proj[e].double() + experts.gate_up_proj_bias[e].double()
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
        assert_reads(stats, f"model.layers.0.mlp.experts.gate_up_proj.{e}", x)
        inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        assert_reads(stats, f"model.layers.0.mlp.experts.down_proj.{e}", inner)


class Grouped(nn.Linear):
    """A linear map of every group of its input by itself, as DeepSeek-V4's output projection."""

    def __init__(self, groups: int):
        super().__init__(6, groups * 5, bias=False)
        self.n_groups = groups

    def forward(self, x):  # (tokens, groups, 6)
        weight = self.weight.view(self.n_groups, 5, 6).transpose(1, 2)
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def test_groups_of_a_linear_map():
    block = nn.Sequential(Grouped(3))
    (stack,) = Mixtures(block).stacks[block[0]]
    matrices = [Matrix(f"g.{e}", 0, block[0], "weight", e, stack.count) for e in range(stack.count)]
    x = torch.randn(7, 3, 6)
    found = list(matrix_inputs(matrices, (x,), {}))
    assert [matrix.name for matrix, _ in found] == ["g.0", "g.1", "g.2"]
    for e, (matrix, part) in enumerate(found):
        assert torch.equal(matrix.weight, block[0].weight[5 * e : 5 * e + 5])
        assert torch.equal(part, x[:, e])


class Mixture(nn.Module):
    """Everything in one module, of names that nobody knows."""

    def __init__(self):
        super().__init__()
        self.choose = nn.Linear(16, 3, bias=False)
        self.a = nn.Parameter(torch.randn(3, 16, 24))
        self.b = nn.Parameter(torch.randn(3, 24, 16))

    def forward(self, x):
        scores = self.choose(x).softmax(-1)
        return sum(scores[:, e, None] * (silu(x @ self.a[e]) @ self.b[e]) for e in range(3))


def test_a_mixture_in_one_module_of_unknown_names():
    mixture = Mixture()
    found = Mixtures(mixture)
    assert found.routers == {mixture.choose.weight}
    assert [(s.parameter, s.count, s.transposed) for s in found.stacks[mixture]] == [("a", 3, True), ("b", 3, True)]
    matrices = [Matrix(f"{p}.{e}", 0, mixture, p, e, 3, True) for p in "ab" for e in range(3)]
    x = torch.randn(5, 16)
    inputs = {matrix.name: read for matrix, read in matrix_inputs(matrices, (x,), {})}
    assert torch.equal(inputs["a.2"], x)
    torch.testing.assert_close(inputs["b.2"], silu(x @ mixture.a[2]))


def experts(count: int, make=nn.ModuleList) -> nn.Module:
    made = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(count)]
    return make(made) if make is nn.ModuleList else make({str(e): one for e, one in enumerate(made)})


@pytest.mark.parametrize("make", [nn.ModuleList, nn.ModuleDict])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_router_is_found_by_its_outputs(make, depth):
    """However it is wrapped and however far above its experts it lies; a map of as many outputs in front of another
    is no router.
    """
    block = nn.Module()
    block.attention = nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 16))
    block.chooser = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))
    block.shared, block.weigh = nn.Linear(16, 16), nn.Linear(16, 1)
    holder = experts(5, make)
    for _ in range(depth):
        inner, holder = holder, nn.Module()
        holder.inside = inner
    block.mixture = holder
    routers = Mixtures(block).routers
    assert routers == {block.chooser[0].weight, block.chooser[2].weight, block.weigh.weight}


def test_experts_in_no_list_are_told_by_numbered_names():
    """Two maps of one module that are numbered (fc1, fc2) are none, nor are numbered modules of different shapes."""
    block = nn.Module()
    block.mixture, block.attention = nn.Module(), nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16))
    block.mixture.router = nn.Linear(16, 4)
    for number, expert in enumerate(experts(4)):
        block.mixture.add_module(f"expert_{number}", expert)
    assert Mixtures(block).routers == {block.mixture.router.weight}
    plain = nn.Module()
    plain.fc1, plain.fc2, plain.gate = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 2)
    plain.part1, plain.part2 = nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 24))
    assert not Mixtures(plain).routers


def test_a_router_that_is_stored_as_in_by_out():
    block = nn.Module()
    block.choose, block.weigh, block.experts = Conv1D(5, 16), Conv1D(1, 16), experts(5)
    assert Mixtures(block).routers == {block.choose.weight, block.weigh.weight}


def test_what_gives_as_many_as_it_reads_is_no_router():
    """The third dimension of a bilinear map has the width of everything else."""
    block = nn.Module()
    block.o, block.both = nn.Linear(16, 16), nn.Bilinear(16, 16, 16)
    block.mlp = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))
    found = Mixtures(block)
    assert not found.routers
    assert not found.stacks


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("order", ["rwr", "rrw", "rw"])
def test_which_way_round_experts_are_stored(order, turned):
    """Whatever order they come in: those that read the hidden state (r) and the one that writes it (w)."""
    block = nn.Module()
    block.choose = nn.Linear(16, 3)
    for index, kind in enumerate(order):
        shape = (24, 16) if (kind == "r") != turned else (16, 24)
        block.register_parameter(f"w{index}", nn.Parameter(torch.randn(3, *shape)))
    assert [stack.transposed for stack in Mixtures(block).stacks[block]] == [turned] * len(order)


def test_the_nearest_router_is_the_one():
    block, block.mlp = nn.Module(), nn.Module()
    block.head_gate = nn.Linear(16, 4)  # as many heads as experts
    block.mlp.gate, block.mlp.experts = nn.Linear(16, 4), experts(4)
    assert Mixtures(block).routers == {block.mlp.gate.weight}


def test_a_block_without_experts_has_no_router():
    block = nn.Module()
    block.narrow, block.wide = nn.Linear(16, 1), nn.Linear(16, 16)
    assert not Mixtures(block).routers


def test_parameters_that_are_no_stack_stay_whole():
    """(heads, width, width) of a recurrence, and (d, heads, width) of an attention kept in three dimensions."""
    block = nn.Module()
    block.num_heads, block.q, block.gate = 4, nn.Parameter(torch.randn(16, 4, 4)), nn.Parameter(torch.randn(4, 8, 8))
    block.o = nn.Linear(16, 16)
    assert not Mixtures(block).stacks


def test_products_see_parts_batches_and_both_sides():
    stored = torch.randn(3, 6, 4)
    held = [Matrix(f"m{e}", 0, _holder(stored), "weight", e, 3) for e in range(3)]
    x = torch.randn(5, 4)
    with Products(held) as products:
        x @ stored[1][:2].T  # some of its outputs
        stored[2] @ x.T  # as the left factor
        torch.bmm(x.expand(3, 5, 4), stored.mT)  # all at once
        x @ torch.randn(6, 4).T  # another matrix
    assert [matrix.name for matrix, _ in products.found] == ["m1", "m2", "m0", "m1", "m2"]
    assert all(torch.equal(read, x) for _, read in products.found)


def test_a_matrix_multiplied_the_other_way_round_is_refused():
    stored = torch.randn(3, 4, 4)
    held = [Matrix("m", 0, _holder(stored), "weight", 0, 3)]
    with pytest.raises(RunError, match="the other way round"), Products(held):
        torch.randn(5, 4) @ stored[0]


def _holder(stored: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(stored, requires_grad=False)
    return module
