"""Pruning block by block out of files and into files: the same numbers as in memory, for every model and pruner."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_bad_input import save_tokenizer
from tiny import pairs, tiny_model, tiny_tokens

from lib import PRUNERS, LanguageModel, Pattern, RunConfig, RunError, find_source, perplexity, prune_model, results
from lib.activations import Store
from lib.load import load_model, open_model
from lib.results import Journal


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by the names they have in its files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(tmp_path, **options) -> RunConfig:
    base = {
        "model": str(tmp_path / "model"), "prune_method": "wanda", "sparsity_ratio": 0.5, "stream": True, "seqlen": 24,
        "save": str(tmp_path / "out"), "save_model": str(tmp_path / "pruned"), "calib_data": "pydoc",
        "eval_data": "pydoc", "device": "cpu", "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    return RunConfig(**{**base, **options})


def targets_of(model: LanguageModel) -> dict[str, float]:
    return {m.name: 0.3 + 0.4 * i / len(model.matrices) for i, m in enumerate(model.matrices)}


@pytest.mark.parametrize(("architecture", "pruner"), pairs([*PRUNERS], at_least=2))
def test_streamed_is_in_memory_to_the_bit(architecture, pruner, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()

    whole = load_model(source, "cpu")
    prune_model(whole, PRUNERS[pruner], targets_of(whole), Pattern(), tokens, batch_size=4)
    results.save_checkpoint(whole, tmp_path / "whole")

    streamed = open_model(source, "cpu")
    streamed.load_non_blocks()
    journal = Journal(config_of(tmp_path), streamed)
    store = Store(tmp_path, limit=0)  # everything in the file
    prune_model(
        streamed, PRUNERS[pruner], targets_of(streamed), Pattern(), tokens, batch_size=4, commit=journal.commit,
        store=store,
    )  # fmt: skip
    journal.finish()

    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pruned")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, whole.model(tokens).logits)
    assert perplexity(streamed, tokens, batch_size=2, store=store) == perplexity(whole, tokens, batch_size=2)
    for name in ("config.json", "generation_config.json"):
        one, other = (json.loads((tmp_path / side / name).read_text()) for side in ("whole", "pruned"))
        assert one == other, name
    assert not list(tmp_path.glob("activations*"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_streamed_is_in_memory_with_a_dense_model_beside_it(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()
    whole, streamed = load_model(source, "cpu"), open_model(source, "cpu")
    streamed.load_non_blocks()
    journal = Journal(config_of(tmp_path), streamed)
    for model, more in ((whole, {}), (streamed, {"commit": journal.commit, "store": Store(tmp_path, limit=0)})):
        prune_model(
            model, PRUNERS["alps"], targets_of(model), Pattern(), tokens, batch_size=4, asymmetry=0.5, recovery=True,
            **more,
        )  # fmt: skip
    journal.finish()
    results.save_checkpoint(whole, tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pruned")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_files_and_of_runs(stored, dtype, tmp_path):
    tiny_model("llama_tied").to(stored).save_pretrained(tmp_path / "model")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()
    whole = load_model(source, "cpu", dtype)
    streamed = open_model(source, "cpu", dtype)
    streamed.load_non_blocks()
    assert perplexity(streamed, tokens) == perplexity(whole, tokens)
    journal = Journal(config_of(tmp_path, dtype=dtype), streamed)
    for model, commit in ((whole, None), (streamed, journal.commit)):
        prune_model(model, PRUNERS["wanda"], targets_of(model), Pattern(), tokens, commit=commit)
    journal.finish()
    for name, tensor in tensors_of(tmp_path / "pruned").items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_only_one_block_is_resident(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    streamed = open_model(find_source(str(tmp_path / "model")), "cpu")
    streamed.load_non_blocks()
    seen = []

    def look(block, _stats, _events):
        state = [all(not p.is_meta for p in module.parameters()) for module in streamed.blocks]
        seen.append(state)
        assert state == [i == block for i in range(3)]

    prune_model(streamed, PRUNERS["sparsegpt"], targets_of(streamed), Pattern(), tiny_tokens(), commit=look)
    assert len(seen) == 3
    assert all(p.is_meta for module in streamed.blocks for p in module.parameters())


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path


def journal_after(folder, blocks: int, **options) -> None:
    """A run that was killed when so many blocks were committed."""
    streamed = open_model(find_source(str(folder / "model")), "cpu")
    streamed.load_non_blocks()
    journal = Journal(config_of(folder, **options), streamed)

    def commit(block, stats, events):
        if block == blocks:
            raise KeyboardInterrupt
        journal.commit(block, stats, events)

    with pytest.raises(KeyboardInterrupt):
        prune_model(streamed, PRUNERS["wanda"], targets_of(streamed), Pattern(), tiny_tokens(), commit=commit)


def test_a_journal_of_another_configuration_is_refused_with_the_difference(folder):
    journal_after(folder, 2)
    streamed = open_model(find_source(str(folder / "model")), "cpu")
    with pytest.raises(RunError, match=r"--save_model .*--seed was 0 and is 3; --restart"):
        Journal(config_of(folder, seed=3), streamed)
    assert Journal(config_of(folder), streamed).done == 2
    assert Journal(config_of(folder, seed=3, restart=True), streamed).done == 0


def test_a_journal_of_other_weights_is_refused(folder):
    journal_after(folder, 1)
    tiny_model("llama", seed=9).save_pretrained(folder / "model")
    with pytest.raises(RunError, match=r"--model .* had other weights; --restart"):
        Journal(config_of(folder), open_model(find_source(str(folder / "model")), "cpu"))


def test_activations_in_a_file_are_those_in_memory(tmp_path):
    from lib.activations import Activations

    batches = [torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(1, 5, 3)]
    kept = [Activations(torch.device("cpu"), 3, store) for store in (None, Store(tmp_path, 10**9), Store(tmp_path, 0))]
    for batch in batches:
        for activations in kept:
            activations.put(len(activations), batch)
    for activations in kept:
        activations.put(1, activations[1] * 2)
    for activations in kept:
        assert torch.equal(torch.cat(list(activations)), torch.cat([batches[0], batches[1] * 2, batches[2]]))
    assert kept[2]._mapped is not None
    assert kept[1]._mapped is None


def test_no_room_for_activations_is_one_error(tmp_path):
    with pytest.raises(RunError, match="--activation_memory"):
        Store(tmp_path, 0).map(10**15, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_streamed_on_cuda_is_in_memory_on_cuda(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()
    whole, streamed = load_model(source, "cuda", "float32"), open_model(source, "cuda", "float32")
    streamed.load_non_blocks()
    journal = Journal(config_of(tmp_path, device="cuda"), streamed)
    prune_model(whole, PRUNERS["wanda"], targets_of(whole), Pattern(), tokens)
    prune_model(
        streamed, PRUNERS["wanda"], targets_of(streamed), Pattern(), tokens, commit=journal.commit,
        store=Store(tmp_path, 0),
    )  # fmt: skip
    journal.finish()
    for name, tensor in tensors_of(tmp_path / "pruned").items():
        assert torch.equal(tensor, whole.model.state_dict()[name].cpu()), name
