"""Writes a random Llama checkpoint, sharded and in bfloat16, never holding more than one shard of it.

To show what large models need where none can be had. The defaults are 3.0 billion parameters, 6 GB, 28 blocks; the
tokenizer is one token a byte.

    python script/random_checkpoint.py DIR [--hidden 3072] [--intermediate 8192] [--blocks 28] [--sparsity 0.7]

With --sparsity, so many weights of the blocks' matrices are zero, anywhere.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHARD = 500_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (("hidden", 3072), ("intermediate", 8192), ("blocks", 28), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=0.0)
    options = parser.parse_args()

    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks, num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 384), max_position_embeddings=4096, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(options.folder)
    save_byte_tokenizer(options.folder)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}

    torch.manual_seed(options.seed)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        sparsities = {name: options.sparsity if ".layers." in name else 0.0 for name in names}
        tensors = {name: random_parameter(shapes[name], sparsity) for name, sparsity in sparsities.items()}
        save_file(tensors, options.folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{total / 2e9:.2f} billion parameters, {total / 1e9:.2f} GB in {len(shards)} shards")


def random_parameter(shape: torch.Size, sparsity: float) -> torch.Tensor:
    """Ones for a norm; for a matrix a Gaussian one that keeps the size of what it is multiplied with."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 0.7 * (shape[1] * (1 - sparsity)) ** -0.5
    parameter = torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)
    return parameter.masked_fill_(torch.rand(shape) < sparsity, 0) if sparsity else parameter


def save_byte_tokenizer(folder: Path) -> None:
    """Every byte of UTF-8 is a token."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
