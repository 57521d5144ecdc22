"""Families whose blocks share modules, are called again, or hand things on: as their own forward, in memory or not."""

import pytest
import torch
import transformers
from test_architectures import targets_of
from test_stream import config_of, tensors_of
from tiny import tiny_model, tiny_tokens
from transformers import CONFIG_MAPPING

from lib import PRUNERS, LanguageModel, Pattern, RunError, find_source, perplexity, prune_model, results
from lib.activations import Store
from lib.blockwise import BlockwisePass
from lib.load import load_model, open_model, weight_files
from lib.results import Journal
from lib.sequential import walk
from lib.shards import ShardedModel, Shards

_ALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
_LLAMA = {**_ALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "num_key_value_heads": 4}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TWICE = ["sliding_attention", "full_attention"] * 3

# name -> the configuration's arguments
FAMILIES = {
    "zamba": {  # one attention block for all hybrid layers
        **_ALL, "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 16, "n_mamba_heads": 2,
        "mamba_dt_rank": 4, "mamba_d_state": 8, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "use_mamba_kernels": False,
    },
    "zamba2": {  # two, in turn, with adapters of each layer's own
        **_ALL, "num_hidden_layers": 5, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_headdim": 16,
        "mamba_ngroups": 1, "mamba_d_state": 8, "chunk_size": 8, "num_mem_blocks": 2, "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid", "hybrid"], "use_shared_attention_adapter": True,
    },
    "dory": {  # a layer called again, with what the first one gave added
        **_LLAMA,
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_loops": 2,
    },
    # layers that choose tokens for those after them
    "hy_v4": {**_LLAMA, **_INDEXED, **_MOE, **_TOKENS, "num_hidden_layers": 4},
    "glm_moe_dsa": {**_LLAMA, **_INDEXED, **_MOE, "num_hidden_layers": 4, "pad_token_id": None},
    "gemma3n_text": {  # keys and values in a dict that all layers are called with; several hidden states at once
        **_LLAMA, "num_hidden_layers": 6, "head_dim": 8, "num_kv_shared_layers": 2, "layer_types": _TWICE,
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
        "sliding_window": 8, "activation_sparsity_pattern": None, "pad_token_id": 0,
    },
    "gemma4_text": {
        **_LLAMA, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2,
        "layer_types": _TWICE, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "sliding_window": 8,
    },
    "openai-gpt": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},  # lists
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4},
    "xlnet": {"vocab_size": 96, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},  # (S, B, d)
}  # fmt: skip
HERE = [name for name in FAMILIES if name in CONFIG_MAPPING]


def family(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**FAMILIES[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", HERE)
def test_the_stream_is_the_models_own_forward(name):
    hf = family(name)
    for windows, seqlen in ((3, 24), (2, 37)):
        tokens = tiny_tokens(windows, seqlen, seed=seqlen)
        with torch.no_grad():
            expected = torch.cat([hf(input_ids=part, use_cache=False).logits for part in tokens.split(2)])
        model = LanguageModel(hf)
        blockwise = BlockwisePass(model, tokens, batch_size=2)
        for visit in range(len(blockwise.visits)):
            blockwise.advance(visit)
        assert torch.equal(torch.cat([model.logits(last) for _, last in blockwise.outputs()]), expected)


@pytest.mark.parametrize("name", HERE)
def test_streamed_is_in_memory_to_the_bit(name, tmp_path):
    family(name).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()
    whole, streamed = load_model(source, "cpu"), open_model(source, "cpu")
    assert whole.coverage == streamed.coverage < 1
    streamed.load_non_blocks()
    assert perplexity(streamed, tokens, batch_size=2) == perplexity(whole, tokens, batch_size=2)
    journal = Journal(config_of(tmp_path), streamed)
    for model, more in ((whole, {}), (streamed, {"commit": journal.commit, "store": Store(tmp_path, limit=0)})):
        prune_model(model, PRUNERS["sparsegpt"], targets_of(model), Pattern(), tokens, batch_size=4, **more)
    journal.finish()
    results.save_checkpoint(whole, tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pruned")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert perplexity(streamed, tokens, batch_size=2) == perplexity(whole, tokens, batch_size=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, whole.model(input_ids=tokens).logits)


@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
@pytest.mark.parametrize("name", ["zamba", "dory"])
def test_a_run_that_was_cut_off_ends_in_the_same_weights(name, asymmetry, tmp_path):
    if name not in HERE:
        pytest.skip("not in this version of transformers")
    family(name).save_pretrained(tmp_path / "model")
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens()
    whole, config = load_model(source, "cpu"), config_of(tmp_path)
    how = {"batch_size": 4, "asymmetry": asymmetry}
    prune_model(whole, PRUNERS["sparsegpt"], targets_of(whole), Pattern(), tokens, **how)
    results.save_checkpoint(whole, tmp_path / "whole")
    for _ in range(len(whole.blocks)):
        streamed = open_model(source, "cpu")
        streamed.load_non_blocks()
        journal = Journal(config, streamed)
        journal.use_committed(journal.done)

        def commit(block, stats, events, journal=journal, until=journal.done):
            if block > until:
                raise KeyboardInterrupt
            journal.commit(block, stats, events)

        try:
            prune_model(
                streamed, PRUNERS["sparsegpt"], targets_of(streamed), Pattern(), tokens, done=journal.done,
                commit=commit, **how,
            )  # fmt: skip
        except KeyboardInterrupt:
            continue
    journal.finish()
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pruned")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_shared_is_listed_once():
    model = LanguageModel(family("zamba"))
    shared = [matrix for matrix in model.matrices if matrix.earlier]
    assert {matrix.block for matrix in shared} == {3}
    assert len(shared) == 7
    assert model.prunable_parameters == sum(p.numel() for p in {m.stored for m in model.matrices})
    given = [matrix.name for step in walk(model, tiny_tokens(), "diagonal") for matrix in step.matrices]
    assert sorted(given) == sorted(matrix.name for matrix in model.matrices)


def test_the_projection_that_mamba_reads_without_a_call_has_statistics():
    model, events = LanguageModel(family("mamba")), []
    prune_model(model, PRUNERS["wanda"], targets_of(model), Pattern(), tiny_tokens(), batch_size=4, events=events)
    assert not events


def test_what_a_block_shares_with_the_rest_is_refused_when_streamed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    streamed = open_model(find_source(str(tmp_path / "model")), "cpu")
    streamed.model.model.norm.weight = streamed.model.model.layers[1].input_layernorm.weight
    streamed = ShardedModel(Shards(streamed.model, weight_files(find_source(str(tmp_path / "model"))), "tiny"))
    with pytest.raises(
        RunError, match=r"--stream: model\.layers\.1\.input_layernorm\.weight is also model\.norm\.weight"
    ):
        streamed.load_non_blocks()
