"""Continues a text with a pruned model whose zeros are left out, and says how fast and in how much memory.

    python script/generate.py --model DIR --prompt "Once upon a time" [--dense | --compare] [--static]

The text is streamed as it is made, greedily. --dense keeps the zeros; --compare does both, one after the other.
"""

import functools
import gc
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported says nothing

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
import transformers

from lib import RunError, cli, find_source, load_model, load_tokenizer, sparse_model
from lib.attention import without_cudnn_attention
from lib.flags import Flags, flag
from lib.load import DTYPES, Source, choose_device, context_length, load_config
from lib.memory import forget_peak, resident_peak
from lib.model import check_tokens
from lib.results.run import peak_memory
from lib.sparse import own_dtype

PURPOSE = __doc__.splitlines()[0]
COLUMNS = ("", "first token, s", "tokens/s", "weights, GB", "peak memory, GB")


class Timed(transformers.TextStreamer):
    """Prints the new text, and remembers when each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first is the prompt's
        super().put(value)


@dataclass(frozen=True)
class GenerateFlags(Flags):
    """The flags of this command. Raises RunError on construction for a value that cannot be honoured."""

    command = "script/generate.py"
    purpose = PURPOSE

    model: str = flag("", "folder of a pruned checkpoint, or what else main.py takes", group="model")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N", group="model")
    dtype: str = flag(
        "auto", "auto: bfloat16 where the checkpoint is, float32 for others on the CPU", group="model",
        choices=lambda: list(DTYPES),
    )  # fmt: skip
    cache_dir: str = flag("llm_weights", "folder for downloaded models", group="model")
    dense: bool = flag(False, "keep the zeros", group="method")
    compare: bool = flag(False, "without the zeros, and then with them", group="method")
    static: bool = flag(
        False, "with a static cache; on cuda the model is compiled for the first text, and tokens come without "
        "Python's overhead", group="method",
    )  # fmt: skip
    prompt: str = flag("", "the text to continue", group="text")
    max_new_tokens: int = flag(64, "most tokens to add", group="text", least=1)

    def __post_init__(self):
        self.check_each("model")
        if self.dense and self.compare:
            raise RunError("--compare: does what --dense does as well; leave one out")

    def relief(self, stage: str | None) -> str:
        """What takes less of a GPU's memory."""
        return "a GPU with room for the model (--device), or --device cpu"


def measured(source: Source, tokenizer, tokens: torch.Tensor, options: GenerateFlags, dense: bool) -> tuple:
    """A row of the table: the model is loaded, the text printed, and the model let go."""
    forget_peaks(options.device)
    dtype = own_dtype(source, options.device, options.dtype)
    if dense:
        model = load_model(source, options.device, str(dtype).removeprefix("torch.")).model
    else:
        model = sparse_model(source, device=options.device, dtype=options.dtype, compiled=options.static)
    check_tokens(source.name, model, tokens)
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    own = model.generation_config
    config = transformers.GenerationConfig(
        max_new_tokens=options.max_new_tokens, do_sample=False, eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id,
        cache_implementation="static" if options.static else None,
    )  # fmt: skip
    write = functools.partial(model.generate, tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    with torch.no_grad(), without_cudnn_attention():
        write() if options.static else model(tokens)  # what is compiled is compiled before the clock starts
        streamer, begin = Timed(tokenizer), time.perf_counter()
        write(streamer=streamer)
    times = streamer.times[1:]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
    held = {part.data_ptr(): part.nbytes for part in (*model.parameters(), *model.buffers())}
    return "dense" if dense else "sparse", times[0] - begin, rate, sum(held.values()) / 1e9, peak(options.device) / 1e9


def forget_peaks(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    forget_peak()


def peak(device: str) -> int:
    """Bytes held at most: on GPUs theirs, else the process's, of which Linux tells the peak."""
    if device.startswith("cuda"):
        return sum(size for name, size in peak_memory().items() if name.startswith("cuda"))
    return resident_peak() or psutil.Process().memory_info().rss


def generate(options: GenerateFlags) -> str:
    """The text is printed as it comes; what it took is returned, as a table."""
    options = replace(options, device=choose_device(options.device))
    source = find_source(options.model, options.cache_dir)
    config, tokenizer = load_config(source), load_tokenizer(source)
    tokens = tokenizer(options.prompt, return_tensors="pt").input_ids
    if tokens.numel() == 0:
        raise RunError("--prompt: has no token; give the text to continue")
    limit = context_length(config)
    if limit and tokens.shape[1] + options.max_new_tokens > limit:
        raise RunError(
            f"--prompt: its {tokens.shape[1]} tokens and --max_new_tokens {options.max_new_tokens} are more than the "
            f"{limit} that the model takes"
        )
    rows = [
        measured(source, tokenizer, tokens.long(), options, dense)
        for dense in ((False, True) if options.compare else (options.dense,))
    ]
    table = ["", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, first, rate, weights, most in rows:
        table.append(f"| {name} | {first:.2f} | {rate:.1f} | {weights:.2f} | {most:.2f} |")
    return "\n".join(table)


if __name__ == "__main__":
    sys.exit(cli.main(generate, kind=GenerateFlags))
