"""The asymmetric target: its statistics against the plain forward, its weights against least squares in float64."""

import numpy as np
import pytest
import torch
from test_sequential import inputs_by_hook
from tiny import tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, prune_model
from lib.blockwise import BlockwisePass
from lib.pruners.asymmetry import asymmetric_weights
from lib.pruners.damping import DAMPING
from lib.sequential import walk
from lib.stats import InputStats


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon", "gpt2", "opt"])
def test_cross_grams_are_those_of_two_plain_forwards(architecture):
    dense, hf, tokens = tiny_model(architecture), tiny_model(architecture), tiny_tokens()
    model = LanguageModel(hf)
    in_dense = inputs_by_hook(dense, tokens, [m.name for m in model.matrices])
    for step in walk(model, tokens, "gram", batch_size=4, dense=True, cross=True):
        # This stage and what follows is dense, all before it is pruned: so is the plain forward.
        in_pruned = inputs_by_hook(hf, tokens, [m.name for m in step.matrices])
        for matrix in step.matrices:
            found, x = step.stats[matrix.name], in_pruned[matrix.name]
            assert found.paired == found.tokens == tokens.numel()
            torch.testing.assert_close(found.cross.double(), in_dense[matrix.name].T @ x, rtol=1e-3, atol=1e-3)
            matrix.write(matrix.weight * (torch.rand(matrix.shape) > 0.5))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_experts_are_paired_by_the_pruned_models_routing(architecture):
    """In the first block both streams are one, and so the cross Gram is the Gram, whatever the routing."""
    model, seen = LanguageModel(tiny_model(architecture)), []
    for step in walk(model, tiny_tokens(), "gram", batch_size=4, dense=True, cross=True):
        seen += [matrix.name for matrix in step.matrices]
        assert all(stats.paired == stats.tokens for stats in step.stats.values())
        if step.block == 0:
            for stats in step.stats.values():
                torch.testing.assert_close(stats.cross, stats.gram, rtol=1e-4, atol=1e-4)
        else:
            assert not all(torch.allclose(s.cross, s.gram, rtol=1e-2) for s in step.stats.values())
        if step.last and step.block == 0:
            for matrix in model.matrices_of(0):
                matrix.write(torch.zeros_like(matrix.weight))
    assert sorted(seen) == sorted(matrix.name for matrix in model.matrices)


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),
        ("mixtral", ["q_proj k_proj v_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_stages_follow_the_data(architecture, kinds):
    model = LanguageModel(tiny_model(architecture))
    blockwise = BlockwisePass(model, tiny_tokens(), 2)
    blockwise.advance(0)
    stages = blockwise.stages(1, model.matrices_of(1))
    named = [dict.fromkeys(m.name.rstrip("0123456789.").rpartition(".")[2] for m in stage) for stage in stages]
    assert [" ".join(names) for names in named] == kinds


def paired_stats(x: torch.Tensor, dense: torch.Tensor) -> InputStats:
    stats = InputStats("gram", cross=True)
    stats.add(x, dense)
    stats.finish()
    return stats


@pytest.mark.parametrize("asymmetry", [0.3, 1.0])
def test_aim_is_ridge_regression_on_the_mixed_target(asymmetry):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((200, 12)), rng.standard_normal((5, 12))
    dense = x @ rng.standard_normal((12, 12)) / 4 + 0.3 * rng.standard_normal((200, 12))
    ridge = DAMPING * np.square(x).sum() / 12
    target = ((1 - asymmetry) * x + asymmetry * dense) @ weight.T
    stacked = np.vstack([x, np.sqrt(ridge) * np.eye(12)])
    wanted = np.vstack([target, np.sqrt(ridge) * weight.T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    stats = paired_stats(torch.tensor(x).float(), torch.tensor(dense).float())
    found = asymmetric_weights(torch.tensor(weight).float(), stats, asymmetry)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_the_matrix_that_writes_the_blocks_output_is_aimed_at_it():
    """With a = 1 and nothing removed, the block's output comes as close to the dense block's as least squares allow."""
    tokens = tiny_tokens(24, 48)
    dense, hf = tiny_model("llama"), tiny_model("llama")
    model, block = LanguageModel(hf), 1
    seen: dict[str, torch.Tensor] = {}

    def outputs(model_) -> torch.Tensor:
        layer = model_.model.layers[block]
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out: seen.__setitem__("out", out.flatten(0, 1).double())),
            layer.mlp.down_proj.register_forward_hook(
                lambda _m, a, out: seen.update(x=a[0].flatten(0, 1).double(), y=out.flatten(0, 1).double())
            ),
        ]
        with torch.no_grad():
            model_(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen["out"]

    wanted = outputs(dense).numpy()
    for step in walk(model, tokens, "gram", batch_size=8, dense=True, cross=True):
        if step.block == 0 and step.last:
            for matrix in model.matrices_of(0):
                matrix.write(PRUNERS["magnitude"].prune(matrix.weight, None, 0.3, Pattern()))
        if step.block == block and step.last:
            (matrix,) = step.matrices
            outputs(hf)
            x, ridge = seen["x"].numpy(), DAMPING * float(seen["x"].square().sum()) / seen["x"].shape[1]
            stacked = np.vstack([x, np.sqrt(ridge) * np.eye(x.shape[1])])
            target = np.vstack([wanted - (seen["out"] - seen["y"]).numpy(), np.sqrt(ridge) * matrix.weight.numpy().T])
            expected = np.linalg.lstsq(stacked, target, rcond=None)[0].T
            found = asymmetric_weights(matrix.weight, step.stats[matrix.name], 1.0)
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-2, atol=1e-3)
            return


@pytest.mark.parametrize(
    ("architecture", "writes"),
    [("llama", True), ("gpt2", True), ("opt", True), ("falcon", True), ("gemma2", False), ("mixtral", False)],
)
def test_which_matrices_write_a_blocks_output(architecture, writes):
    """Not behind a norm of its own (Gemma 2), and not experts."""
    model = LanguageModel(tiny_model(architecture))
    blockwise = BlockwisePass(model, tiny_tokens(), 2)
    last = blockwise.stages(0, model.matrices_of(0))[-1]
    assert blockwise.residual_writer(0, last) is (last[0] if writes else None)
    assert blockwise.residual_writer(0, blockwise.stages(0, model.matrices_of(0))[0]) is None


def test_tokens_without_a_counterpart_leave_the_weight_alone_and_are_noted():
    stats = InputStats("gram", cross=True)
    x, weight = torch.randn(50, 6), torch.randn(3, 6)
    stats.add(x, torch.randn(50, 6))
    stats.add(x[:4])
    stats.finish()
    assert torch.equal(asymmetric_weights(weight, stats, 0.5), weight)
    assert torch.equal(asymmetric_weights(weight, stats, 0.5), weight)
    assert stats.events == ["asymmetry: 4 of its 54 tokens have no dense input; left out"]


def test_it_brings_the_next_blocks_inputs_closer_to_the_dense_ones():
    tokens, names, distance = tiny_tokens(24, 48), None, {}
    for asymmetry in (0.0, 0.5):
        model = LanguageModel(tiny_model("llama"))
        names = [m.name for m in model.matrices_of(len(model.blocks) - 1)]
        before = inputs_by_hook(model.model, tokens, names[:1])[names[0]]
        targets = {m.name: 0.5 if m.block < len(model.blocks) - 1 else 0.0 for m in model.matrices}
        prune_model(model, PRUNERS["alps"], targets, Pattern(), tokens, batch_size=8, asymmetry=asymmetry)
        distance[asymmetry] = float((inputs_by_hook(model.model, tokens, names[:1])[names[0]] - before).norm())
    assert distance[0.5] < distance[0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("architecture", "writes"), [("llama", True), ("gemma2", False)])
def test_the_writer_of_large_outputs(architecture, writes, dtype):
    """Gemma 2 normalises what its MLP gives before it is added; of large outputs float16 holds no norm."""
    model = LanguageModel(tiny_model(architecture).to(dtype))
    last = model.matrices_of(0)[-1]
    last.write(1e4 * last.weight)
    blockwise = BlockwisePass(model, tiny_tokens(), 6)
    assert blockwise.residual_writer(0, [last]) is (last if writes else None)
