"""Tiny random models of every supported architecture, made from their configurations without a network."""

from collections.abc import Sequence

import torch
import transformers

_COMMON = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SSM = {"hidden_size": 32, "vocab_size": 96, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 8}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# name -> (configuration class, its arguments, prunable matrices in each block)
CLASSIC = {
    "llama": (transformers.LlamaConfig, _LLAMA, 7),
    "llama_tied": (transformers.LlamaConfig, {**_LLAMA, "tie_word_embeddings": True}, 7),
    "mistral": (transformers.MistralConfig, {**_LLAMA, "sliding_window": 8}, 7),
    "qwen2": (transformers.Qwen2Config, _LLAMA, 7),
    "qwen3": (transformers.Qwen3Config, {**_LLAMA, "head_dim": 8}, 7),
    "gemma2": (transformers.Gemma2Config, {**_LLAMA, "head_dim": 8, "sliding_window": 8}, 7),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        7,
    ),
    "phi3": (transformers.Phi3Config, {**_LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, 4),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
        4,
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 3}, 4),
    "falcon": (
        transformers.FalconConfig,
        {**_COMMON, "num_hidden_layers": 3, "new_decoder_architecture": True, "num_kv_heads": 2},
        4,
    ),
    "falcon_alibi": (
        transformers.FalconConfig,
        {**_COMMON, "num_hidden_layers": 3, "alibi": True, "parallel_attn": False, "multi_query": False},
        4,
    ),
    "opt": (transformers.OPTConfig, {**_COMMON, "ffn_dim": 48, "num_hidden_layers": 3, "word_embed_proj_dim": 32}, 6),
    "opt_350m": (
        transformers.OPTConfig,
        {**_COMMON, "ffn_dim": 48, "num_hidden_layers": 3, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        6,
    ),
    "mixtral": (transformers.MixtralConfig, {**_LLAMA, "num_local_experts": 4}, 4 + 2 * 4),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_LLAMA, **_MOE, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
        4 + 2 * 4,
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_LLAMA, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
        4 + 2 * 4 + 3,
    ),
}

# As above; where the blocks differ, a number for each.
FURTHER = {
    "llama4": (
        transformers.Llama4TextConfig,
        {
            **_LLAMA,
            **_IDS,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        4 + 2 * 4 + 3,
    ),
    "dbrx": (
        transformers.DbrxConfig,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "vocab_size": 96,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        2 + 3 * 4,
    ),
    "jetmoe": (
        transformers.JetMoeConfig,
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
        1 + 2 * 4 + 2 * 4,
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**_LLAMA, **_IDS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        4 + 2 * 4,
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            **_LLAMA,
            **_MOE,
            **_MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        [5 + 3, 5 + 2 * 4 + 3, 5 + 2 * 4 + 3],
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        {
            **_LLAMA,
            **_MOE,
            "head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 40,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
        [3 + 2 * 4 + 3, 3 + 2 * 4 + 3, 4 + 2 * 4 + 3],
    ),
    "gemma3_multimodal": (
        transformers.Gemma3Config,
        {
            "text_config": {**_LLAMA, "head_dim": 8, "sliding_window": 8, "initializer_range": 0.15},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 1,
            "eoi_token_index": 2,
            "image_token_index": 0,
        },
        7,
    ),
    "bert": (
        transformers.BertConfig,
        {**_COMMON, "intermediate_size": 48, "num_hidden_layers": 3, "is_decoder": True},
        6,
    ),
    "gptj": (
        transformers.GPTJConfig,
        {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "rotary_dim": 8},
        6,
    ),
    "bloom": (transformers.BloomConfig, {"vocab_size": 96, "hidden_size": 32, "n_head": 4, "n_layer": 3}, 4),
    "cohere2": (transformers.Cohere2Config, {**_LLAMA, "sliding_window": 8}, 7),
    "rwkv": (
        transformers.RwkvConfig,
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 3,
            "context_length": 64,
        },
        7,
    ),
    "mamba2": (transformers.Mamba2Config, {**_SSM, "n_groups": 2, "expand": 2, "chunk_size": 8}, 2),
    "falcon_h1": (
        transformers.FalconH1Config,
        {
            **_LLAMA,
            "head_dim": 8,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
        4 + 2 + 3,
    ),
    "zamba": (  # whose attention and feed-forward are shared by two blocks
        transformers.ZambaConfig,
        {
            **_COMMON,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "mamba_d_state": 8,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "use_mamba_kernels": False,
            "tie_word_embeddings": True,  # without it transformers shares nothing
        },
        [2, 2 + 1, 2, 2 + 1 + 7],
    ),
}
ARCHITECTURES = CLASSIC | FURTHER
# Rotary and learnt positions, nn.Linear and Conv1D, experts one by one: what is the same for all is tried on these.
SAMPLE = ("llama", "gpt2", "mixtral")


def pairs(values: Sequence, at_least: int) -> list[tuple]:
    """(architecture, value): all values with those of SAMPLE, with every other `at_least` of them, in turn."""
    found = []
    for index, architecture in enumerate(ARCHITECTURES):
        count = len(values) if architecture in SAMPLE else at_least
        found += [(architecture, values[(at_least * index + k) % len(values)]) for k in range(count)]
    return found


def tiny_model(architecture: str, seed: int = 0, **changed) -> torch.nn.Module:
    """A causal LM with weights large enough that a change in any of them shows in the logits; with some options of its
    configuration `changed`.
    """
    make, options, _ = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = make(**{"tie_word_embeddings": False, "initializer_range": 0.15, **options, **changed})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tiny_tokens(windows: int = 6, seqlen: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids (windows, seqlen)."""
    return torch.randint(3, 96, (windows, seqlen), generator=torch.Generator().manual_seed(seed))
