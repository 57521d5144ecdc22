"""The loop over blocks against transformers' own forward."""

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, RunError, prune_model
from lib.blockwise import BlockwisePass
from lib.sequential import walk
from lib.stats import InputStats


def inputs_by_hook(hf, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """What each linear map reads in a plain forward of the whole model, (tokens, in), float64."""
    seen, hooks = {}, []
    for name in names:

        def hook(_module, args, name=name):
            seen[name] = args[0].flatten(0, -2).double()

        hooks.append(hf.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        hf(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon", "gpt2", "opt_350m"])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_statistics_are_those_of_the_plain_forward(architecture, batch_size):
    hf, tokens = tiny_model(architecture), tiny_tokens()
    model = LanguageModel(hf)
    expected = inputs_by_hook(hf, tokens, [m.name for m in model.matrices])
    for step in walk(model, tokens, "gram", batch_size=batch_size):
        for matrix in step.matrices:
            x, found = expected[matrix.name], step.stats[matrix.name]
            assert found.tokens == len(x) == tokens.numel()
            torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found.sum_squares.double(), x.square().sum(0), rtol=1e-4, atol=1e-3)


def test_the_next_block_sees_the_pruned_one():
    hf, tokens = tiny_model("llama"), tiny_tokens()
    model = LanguageModel(hf)
    for step in walk(model, tokens, "diagonal", batch_size=4):
        block, matrices, stats = step.block, step.matrices, step.stats
        # By now every earlier block is zeroed and this one is dense: so is the plain forward's.
        expected = inputs_by_hook(hf, tokens, [m.name for m in matrices])
        for matrix in matrices:
            wanted = expected[matrix.name].square().sum(0)
            torch.testing.assert_close(stats[matrix.name].sum_squares.double(), wanted, rtol=1e-4, atol=1e-4)
        if block == 0:
            for matrix in matrices:
                matrix.write(torch.zeros_like(matrix.weight))


def test_readers_of_one_tensor_share_its_statistics(monkeypatch):
    model, added = LanguageModel(tiny_model("llama")), []
    original = InputStats.add
    monkeypatch.setattr(InputStats, "add", lambda self, x, _=None: (added.append(x.shape), original(self, x)))
    step = next(walk(model, tiny_tokens(6), "diagonal", batch_size=3))
    matrices, stats = step.matrices, step.stats
    by_kind = {matrix.name.rpartition(".")[2]: stats[matrix.name] for matrix in matrices}
    assert by_kind["q_proj"] is by_kind["k_proj"] is by_kind["v_proj"]
    assert by_kind["gate_proj"] is by_kind["up_proj"]
    assert len(added) == 2 * 4  # two batches; inputs of qkv, o, gate and up, down


def test_experts_see_only_the_tokens_routed_to_them():
    hf, tokens = tiny_model("mixtral"), tiny_tokens()
    model = LanguageModel(hf)
    experts, routed = model.blocks[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda _m, args: routed.append(args))
    with torch.no_grad():
        hf(tokens, use_cache=False)
    hidden, chosen = routed[0][0].double(), routed[0][1]
    step = next(walk(model, tokens, "gram", batch_size=len(tokens)))
    matrices, stats = step.matrices, step.stats
    for matrix in (m for m in matrices if m.expert is not None):
        x = torch.stack([hidden[t] for t in range(len(hidden)) if matrix.expert in chosen[t].tolist()])
        if matrix.parameter == "down_proj":
            gate, up = (x @ experts.gate_up_proj[matrix.expert].double().T).chunk(2, dim=-1)
            x = torch.nn.functional.silu(gate) * up
        assert stats[matrix.name].tokens == len(x)
        torch.testing.assert_close(stats[matrix.name].gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_falls_back_to_magnitude_and_says_so():
    model, events = LanguageModel(tiny_model("mixtral")), []
    router = model.blocks[1].mlp.gate
    router.weight.data[2] = 0
    router.weight.data[:2] *= 1e3  # expert 2 loses to one of the others for every token
    router.weight.data[3] *= 1e3
    targets = dict.fromkeys([m.name for m in model.matrices], 0.5)
    with torch.no_grad():
        seen = []
        model.blocks[1].mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
        model.model(tiny_tokens(1, 4), use_cache=False)
    prune_model(model, PRUNERS["wanda"], targets, Pattern(), tiny_tokens(1, 4), events=events)
    unseen = [e for e in range(4) if not (torch.cat(seen) == e).any()]
    assert unseen
    noted = [event["matrix"] for event in events if "magnitude" in event["message"]]
    assert {f"model.layers.1.mlp.experts.gate_up_proj.{e}" for e in unseen} <= set(noted)


def test_hooks_on_blocks_are_part_of_them():
    hf = tiny_model("llama")
    hf.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
    model = LanguageModel(hf)
    blockwise = BlockwisePass(model, tiny_tokens(), 2)
    for visit in range(3):
        blockwise.advance(visit)
    found = torch.cat([last for _, last in blockwise.outputs()])
    torch.testing.assert_close(found, model.hidden_states(tiny_tokens()))


def test_infinite_input_names_the_matrix():
    hf = tiny_model("llama")
    hf.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    model = LanguageModel(hf)
    targets = dict.fromkeys([m.name for m in model.matrices], 0.5)
    with pytest.raises(RunError, match=r"layers\.1\.self_attn\.q_proj"):
        prune_model(model, PRUNERS["wanda"], targets, Pattern(), tiny_tokens(), batch_size=4)
