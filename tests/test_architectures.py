"""Every architecture, pruned: at its target, nothing else touched, saved and loaded unchanged. The classic ones with
every pruner.
"""

import itertools
import re

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, CLASSIC, FURTHER, tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, prune_model, save_checkpoint, sparsity_by_matrix
from lib.blockwise import BlockwisePass


def targets_of(model: LanguageModel) -> dict[str, float]:
    """A different sparsity for every matrix."""
    return {m.name: 0.3 + 0.4 * i / len(model.matrices) for i, m in enumerate(model.matrices)}


def logits_of_stream(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with the blocks' part computed by the sequential path, block by block and in batches."""
    blockwise = BlockwisePass(model, tokens, batch_size=2)
    for block in range(len(model.blocks)):
        blockwise.advance(block)
    return torch.cat([model.logits(last) for _, last in blockwise.outputs()])


def is_tied(hf: torch.nn.Module) -> bool:
    return hf.get_input_embeddings().weight is hf.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_structure_is_found(architecture):
    model = LanguageModel(tiny_model(architecture))
    expected = ARCHITECTURES[architecture][2]
    expected = expected if isinstance(expected, list) else [expected] * 3
    assert [len(model.matrices_of(block)) for block in range(len(model.blocks))] == expected
    assert len({m.name for m in model.matrices}) == len(model.matrices)
    assert model.coverage < 1
    names = " ".join(m.name for m in model.matrices)
    assert "embed" not in names
    assert "head" not in names
    assert all(m.shape[0] > 4 for m in model.matrices)  # the routers' and gates' outputs: four experts, one gate


STAYS_DENSE = {"zamba": 0.15}  # the linear maps of its Mamba heads, which lie in parameters of their own


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stays_dense_is_measured(architecture):
    """By another road: of the blocks' parameters with two dimensions or more, what no matrix is a view of."""
    hf = tiny_model(architecture)
    model = LanguageModel(hf)
    weights = {name: p for name, p in hf.named_parameters() if any(name.startswith(f"{b}.") for b in model.block_names)}
    views = {m.stored.data_ptr() for m in model.matrices}
    beside = re.compile(r"norm|conv|router|gate\.weight|shared_expert_gate|bias|time_mix|ln_|layer\.weight")
    left = {n: p for n, p in weights.items() if p.dim() > 1 and p.data_ptr() not in views and not beside.search(n)}
    share = sum(p.numel() for p in left.values()) / sum(p.numel() for p in weights.values())
    assert set(model.uncovered) == set(left)
    assert model.dense_share == pytest.approx(share)
    assert share == pytest.approx(STAYS_DENSE.get(architecture, 0), abs=0.01)
    assert (model.stays_dense is None) == (share <= 0.01)
    if share > 0.01:
        assert model.stays_dense.startswith(f"{100 * share:.1f} % of the blocks' weights stay dense: ")


PAIRS = [*itertools.product(CLASSIC, PRUNERS), *itertools.product(FURTHER, ["wanda", "sparsegpt"])]


@pytest.mark.parametrize(("architecture", "pruner"), PAIRS)
def test_prune_save_load(architecture, pruner, tmp_path):
    hf, tokens = tiny_model(architecture), tiny_tokens()
    model = LanguageModel(hf)
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    prunable = {m.module.get_parameter(m.parameter).data_ptr() for m in model.matrices}
    targets, events = targets_of(model), []

    prune_model(model, PRUNERS[pruner], targets, Pattern(), tokens, batch_size=4, events=events)

    fallbacks = {event["matrix"] for event in events}
    for name, sparsity in sparsity_by_matrix(model).items():
        size = next(m.size for m in model.matrices if m.name == name)
        assert abs(sparsity - targets[name]) <= 0.51 / size, name
        assert name not in fallbacks or "expert" in name or "linear" in name
    for name, tensor in hf.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == (tensor.data_ptr() in prunable), name

    save_checkpoint(model, tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert is_tied(loaded) == is_tied(hf)
    with torch.no_grad():
        plain = loaded(tokens, use_cache=False).logits
        assert torch.equal(plain, hf(tokens, use_cache=False).logits)
    torch.testing.assert_close(logits_of_stream(model, tokens), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_n_of_m(architecture, pruner):
    model = LanguageModel(tiny_model(architecture))
    targets = dict.fromkeys([m.name for m in model.matrices], 0.5)
    prune_model(model, PRUNERS[pruner], targets, Pattern(group=4), tiny_tokens(), batch_size=4)
    for matrix in model.matrices:
        groups = matrix.weight.reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all(), matrix.name


def test_tied_weights_stay_tied():
    hf = tiny_model("llama_tied")
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
