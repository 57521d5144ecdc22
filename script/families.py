"""The table of tested families, docs/families.md: a tiny random model of every family that transformers'
AutoModelForCausalLM knows, pruned.

    python script/families.py > docs/families.md               # all: two minutes on one core
    python script/families.py --families llama mamba jetmoe    # some

Each is pruned to 50 % by Wanda, and where that is refused by magnitude; then its logits are computed once by the model
itself and once by the way that perplexity takes, and have to agree.
"""

import argparse
import logging
import re
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lib import PRUNERS, LanguageModel, Pattern, RunError, prune_model

LAYERS, WINDOWS, SEQLEN, VOCABULARY = 4, 4, 24, 128

# What a configuration's numbers become, by their name; the first that fits. Numbers of no such name stay.
SIZES = (
    (r"(pad|eod|unk)_(token_)?(id|index)", 0),
    (r"(bos|cls|decoder_start)_token_id", 1),
    (r"(eos|sep|forced_eos)_token_id", 2),
    (r"(boi|eoi|boa|eoa|image|audio|video|mask|vision_start|vision_end|vision_soft).*_(id|index)", 3),
    (r"(.*_)?vocab_size(_.*)?|unpadded_vocab_size|audio_vocab_size", VOCABULARY),
    (r"num_nextn_predict_layers|num_kv_shared_layers|first_k_dense_replace|num_dense_layers", None),
    (r"num_(hidden_|decoder_|encoder_|residual_)?layers|n_layers?|(de|en)coder_layers|.*_num_hidden_layers", LAYERS),
    (r"num_blocks|num_layers_per_stack|n_(input|recurrent|output)_layers|depth", 2),
    (r"(num|n)_(key_value|kv|query)_(heads|groups)|.*_num_key_value_heads|kv_n_heads|num_query_groups", 2),
    (r"linear_num_(key|value)_heads|linear_num_heads", 2),
    (r"(.*_)?(num_)?attention_heads|n_heads?|num_heads|index_n_heads|mamba_(n|num)_heads|n_mamba_heads", 4),
    (r"(.*_)?n(um)?_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"topk_group|n_group|num_expert_group", 1),
    (r"(moe|shared|dense|expert|.*shared_expert).*(intermediate|ffn_hidden)_size", 24),
    (r"(head_dim|.*_head_dim|mamba_d_head|mamba_headdim|d_kv|dim_head|d_head|kv_channels|attention_head_size)", 8),
    (r"qk_(nope|rope)_head_dim|v_head_dim|index_head_dim", 8),
    (r"(hidden_size(_global)?|d_model|n_embd|word_embed_proj_dim|emb_dim|embedding_size|embed_dim|.*_embedding_size"
     r"|lru_width|hidden_dim|dim_model_base|attention_hidden_size|vision_output_dim|out_hidden_size)", 32),
    (r"(.*intermediate_size.*|ffn_dim|(decoder|encoder)_ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size|mlp_dim"
     r"|feed_forward_size)", 48),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 64),
    (r"max_(target|source)_positions|num_position_embeddings", 64),
    (r"(kv|q|o)_lora_rank|.*_rank|hidden_size_per_layer_input|ple_embed_dim|router_hidden_size", 8),
    (r"rotary_dim", 8),
    (r"mamba_d_ssm", 64),
    (r"(mamba_)?d_state|(ssm_)?state_size|rel_extent", 8),
    (r"(mamba_)?n_?groups|o_groups", 2),
    (r"sliding_window(_size)?|attention_window_size|window_size|index_topk|attention_chunk_size", 8),
    (r"image_size|crop_size", 28), (r"patch_size", 14),
)  # fmt: skip


COUNTS_LAYERS = next(pattern for pattern, _ in SIZES if re.fullmatch(pattern, "num_hidden_layers"))
UNCHANGED = ("rope_parameters", "rope_scaling", "id2label", "label2id", "per_layer_config")

# What the rules above do not get right: a family's own arguments.
OWN = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v4": {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"] * 2},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2}, "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2}, "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": True},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2, "attention_head_dim": 16,
              "attention_hidden_size": 64},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "attention_head_dim": 16, "attention_hidden_size": 64},
    "xlm": {"causal": True},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def shrunk(settings: dict) -> dict:
    """The arguments of a configuration class that make it tiny, from the contents of its default."""
    found, layers = {}, {v for k, v in settings.items() if isinstance(k, str) and re.fullmatch(COUNTS_LAYERS, k)}
    if "qk_rope_head_dim" in settings:  # the configuration works the rest out
        settings = {name: value for name, value in settings.items() if name not in ("head_dim", "qk_head_dim")}
    for name, value in settings.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, dict) and name not in UNCHANGED and (smaller := shrunk(value)):
            found[name] = smaller | {k: v for k, v in value.items() if k == "model_type"}
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    found |= {} if size is None else {name: size}
                    break
        elif isinstance(value, list) and len(value) in layers:
            kinds = list({str(item): item for item in value}.values())  # a kind each, then as they come
            found[name] = (kinds + value)[:LAYERS]
    return found | ({"num_key_value_heads": 4} if "qk_rope_head_dim" in settings else {})


def tiny(family: str) -> torch.nn.Module:
    """A random causal LM of the family. Raises whatever transformers does where it cannot be made this small."""
    make = transformers.CONFIG_MAPPING[family]
    config = make(**(shrunk(make().to_dict()) | OWN.get(family, {})))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def try_family(family: str) -> dict:
    """What becomes of one family: a row of the table."""
    tokens = torch.randint(8, VOCABULARY, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(1))
    try:
        hf = tiny(family)
        hf(input_ids=tokens, use_cache=False)
    except Exception as error:  # transformers' own, of as many kinds as it has families
        return {"result": "not tried", "why": f"no tiny model of it: {error}"}
    row = {"class": type(hf).__name__}
    try:
        model = LanguageModel(hf, name=family)
        model.check(Pattern(), tokens)
        row |= {"coverage": model.coverage, "dense": model.dense_share, "why": model.stays_dense or ""}
        try:
            prune(model, "wanda", tokens)
            row["result"] = "pruned"
        except RunError as error:
            prune(model, "magnitude", tokens)
            row |= {"result": "by magnitude", "why": str(error)}
        logits = model.logits(model.hidden_states(tokens))
        torch.testing.assert_close(logits, hf(input_ids=tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        return row
    except RunError as error:
        return row | {"result": "refused", "why": str(error)}
    except Exception as error:  # a defect of this project, whatever it is
        where = traceback.extract_tb(error.__traceback__)[-1]
        return row | {
            "result": "FAILS",
            "why": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
        }


def prune(model: LanguageModel, pruner: str, tokens: torch.Tensor) -> None:
    """Every matrix to 50 %."""
    targets = dict.fromkeys([matrix.name for matrix in model.matrices], 0.5)
    prune_model(model, PRUNERS[pruner], targets, Pattern(), tokens, batch_size=2)


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable()
    rows = {family: try_family(family) for family in options.families}
    results = [row["result"] for row in rows.values()]
    counts = ", ".join(f"{results.count(result)} {result}" for result in sorted(set(results), key=results.index))
    print("# Families tried\n")
    print(f"`python script/families.py > docs/families.md`, with transformers {transformers.__version__}: {counts}.\n")
    print(
        "A tiny random model of each family that `AutoModelForCausalLM` knows, pruned to 50 %. `pruned`: by Wanda, on"
    )
    print(
        "inputs; `by magnitude`: by magnitude only, for the reason given; `not tried`: transformers gives no model of"
    )
    print(
        "this size. Shares are of these tiny models: in a real one embeddings weigh less, and so do small parameters.\n"
    )
    print(
        "| family | result | prunable share of the model | of the blocks stays dense | remark |\n|---|---|---|---|---|"
    )
    for family, row in rows.items():
        shares = [f"{100 * row[key]:.1f} %" if key in row else "" for key in ("coverage", "dense")]
        why = " ".join(row.get("why", "").replace("|", "\\|").split())
        print("|", " | ".join([f"`{family}`", row["result"], *shares, why[:400]]), "|")


if __name__ == "__main__":
    main()
