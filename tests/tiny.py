"""Tiny random models of every supported architecture, made from their configurations without a network."""

import torch
import transformers

_COMMON = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name -> (configuration class, its arguments, prunable matrices in each block)
ARCHITECTURES = {
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
