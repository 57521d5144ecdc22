"""The table of tested families, docs/FAMILIES.md: a tiny random model of every family that transformers'
AutoModelForCausalLM knows, pruned.

    python script/families.py --output docs/FAMILIES.md         # all, about ten minutes on one core
    python script/families.py --families llama mamba jetmoe     # some, printed
"""

import argparse
import re
import sys
import tempfile
import traceback
import warnings
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
    (r"num_nextn_predict_layers|num_kv_shared_layers|first_k_dense_replace|num_dense_layers|zero_expert_num", None),
    (r"num_(hidden_|decoder_|encoder_|residual_)?layers|n_layers?|(decoder|encoder)_layers|.*_num_hidden_layers", LAYERS),
    (r"num_blocks|num_layers_per_stack|n_(input|recurrent|output)_layers|depth", 2),
    (r"(num|n)_(key_value|kv|query)_(heads|groups)|.*_num_key_value_heads|kv_n_heads|num_query_groups", 2),
    (r"linear_num_(key|value)_heads|linear_num_heads", 2),
    (r"(.*_)?(num_)?attention_heads|n_heads?|num_heads|index_n_heads|mamba_(n|num)_heads|n_mamba_heads", 4),
    (r"(.*_)?n(um)?_(local_|routed_)?experts|moe_num_experts|num_expert_group", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|topk_group|n_group", 2),
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


def shrunk(settings: dict) -> dict:
    """The arguments of a configuration class that make it tiny, from the contents of its default."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            found[name] = shrunk(value) | {k: v for k, v in value.items() if k == "model_type"}
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    found |= {} if size is None else {name: size}
                    break
        elif isinstance(value, list) and len(value) > LAYERS and len({*map(str, value)}) < len(value):
            kinds = list({str(item): item for item in value}.values())  # a kind each, then as they come
            found[name] = (kinds + [v for v in value if len(kinds) < LAYERS])[:LAYERS]
    return found


def tiny(family: str) -> torch.nn.Module:
    """A random causal LM of the family. Raises whatever transformers does where it cannot be made this small."""
    make = transformers.CONFIG_MAPPING[family]
    settings = shrunk(make().to_dict())
    config = make(**settings)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder") or family in ("bert",):
            part.is_decoder = True
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """With weights large enough that a change in any of them shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def try_family(family: str) -> dict:
    """What becomes of one family: a row of the table."""
    try:
        hf = tiny(family)
    except Exception as error:
        return {"result": "not made", "why": f"{type(error).__name__}: {error}"}
    row = {"class": type(hf).__name__}
    tokens = torch.randint(3, VOCABULARY - 8, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            hf(input_ids=tokens, use_cache=False)
    except Exception as error:
        return row | {"result": "not made", "why": f"forward: {type(error).__name__}: {error}"}
    try:
        model = LanguageModel(hf)
        row |= {"blocks": len(model.blocks), "coverage": model.coverage, "dense": getattr(model, "dense_share", -1), "names": getattr(model, "dense_names", model.uncovered)}
        for name in ("wanda", "magnitude"):
            events = []
            targets = dict.fromkeys([m.name for m in model.matrices], 0.5)
            try:
                prune_model(model, PRUNERS[name], targets, Pattern(), tokens, batch_size=2, events=events)
            except RunError as error:
                row["why"] = str(error)
                continue
            hidden = model.hidden_states(tokens)
            logits = model.logits(hidden)
            with torch.no_grad():
                plain = hf(input_ids=tokens, use_cache=False).logits
            row["same"] = bool(torch.allclose(logits, plain, rtol=1e-4, atol=1e-4))
            row["events"] = sorted({e["matrix"] for e in events})
            return row | {"result": name}
        return row | {"result": "refused"}
    except RunError as error:
        return row | {"result": "refused", "why": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return row | {"result": "FAILS", "why": f"{type(error).__name__}: {error} at {where.filename[-40:]}:{where.lineno}"}


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--output")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for family in options.families:
        row = try_family(family)
        print(family, row, flush=True)


if __name__ == "__main__":
    main()
