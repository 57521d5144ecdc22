"""Times the calibration loop of lib/sequential.py against the published one, in turn, block by block.

The published loop (Wanda's, SparseGPT's and AlphaPruning's): one window a forward pass, each matrix keeps a statistic
of its own, and the pass that collects runs to the block's end. Both use the same model, windows and threads; nothing is
pruned in between. Prints seconds a block, the ratio, and the share of the arithmetic bound at the machine's own rate of
matrix products.

    python script/benchmark/calibration.py --model smollm2 --needs gram

With --parts it times single steps instead, each as it is and as it was, in turn, on --device, at one width:

    python script/benchmark/calibration.py --parts --width 1024 [--device cuda]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import PRUNERS, Pattern, digest, find_source, load_model, masks
from lib.blockwise import BlockwisePass
from lib.config import TOKENS_AT_ONCE
from lib.memory import copy_to_host, keep_freed_memory
from lib.pruners import sparsegpt
from lib.stats import InputStats

REPEATS = 5


def timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@torch.no_grad()
def published_block(blockwise: BlockwisePass, block: int, needs: str) -> None:
    """Collect and propagate the windows of `blockwise`, made with a batch size of 1."""
    matrices, module = blockwise.model.matrices_of(block), blockwise.model.blocks[block]
    sums = {
        m.name: torch.zeros(m.shape[1], m.shape[1]) if needs == "gram" else torch.zeros(m.shape[1]) for m in matrices
    }

    def hook_of(matrix):
        def hook(_module, args, _output):
            x = args[0].reshape(-1, args[0].shape[-1]).t().float()  # (in, tokens), as published
            sums[matrix.name] += x @ x.t() if needs == "gram" else x.norm(dim=1) ** 2

        return hook

    hooks = [m.module.register_forward_hook(hook_of(m)) for m in matrices]
    for batch in range(len(blockwise)):
        args, kwargs = blockwise.arguments(block, batch)
        module(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    blockwise.advance(block)


def ours_block(blockwise: BlockwisePass, block: int, needs: str) -> None:
    blockwise.collect(block, blockwise.model.matrices_of(block), needs)
    blockwise.advance(block)


def rate() -> float:
    """Floating-point operations a second of a float32 matrix product in cache-sized pieces."""
    a, b, out = torch.randn(1024, 1536), torch.randn(1536, 1536), torch.empty(1024, 1536)
    seconds = min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(50))
    return 2 * a.shape[0] * b.numel() / seconds


def cases(width: int, device: str) -> dict:
    """name -> (a step as it is, as it was, whether it is of GPUs only)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator).to(device)
    x = torch.randn(2 * width, width, generator=generator).to(device)
    flat, half = weight.abs().reshape(1, -1), weight.numel() // 2
    limited = lambda: flat <= flat.kthvalue(half).values  # noqa: E731
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, device=device)

    def solved(pattern: Pattern) -> None:
        stats = InputStats.empty("gram", width, torch.device(device))
        stats.add(x)
        PRUNERS["sparsegpt"].prune(weight, stats, 0.5, pattern)

    def launched(pattern: Pattern) -> None:
        with mock.patch.object(sparsegpt, "captured", lambda function, _device: function):
            solved(pattern)

    def hashed(threads: int) -> None:
        with mock.patch.object(digest, "THREADS", threads):
            digest.digest(model)

    model = mock.Mock()
    model.resident.return_value.__enter__ = model.resident.return_value.__exit__ = mock.Mock(return_value=None)
    matrices = [mock.Mock(weight=weight, size=weight.numel()) for _ in range(8)]
    for number, matrix in enumerate(matrices):
        matrix.name = f"matrix {number}"
    model.groups.return_value, model.matrices = [[matrix] for matrix in matrices], matrices
    return {
        "selection of a matrix's half": (lambda: masks.lowest(flat, half), limited, True),
        "SparseGPT, one captured graph": (lambda: solved(Pattern()), lambda: launched(Pattern()), True),
        "SparseGPT 2:4, one captured graph": (lambda: solved(Pattern(4)), lambda: launched(Pattern(4)), True),
        "ALPS, a penalty's inverse": (
            lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0]),
            lambda: torch.linalg.eigh(damped),
            True,
        ),
        "digest of 8 matrices": (lambda: hashed(digest.THREADS), lambda: hashed(1), False),
        "hidden states to the host": (lambda: copy_to_host(weight), lambda: weight.cpu(), True),
    }  # fmt: skip


def compare_parts(width: int, device: str) -> None:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def once(step) -> float:
        wait()
        return timed(lambda: (step(), wait()))

    print(f"| step, {width} wide, {device} | as it is | as it was | ratio |\n|---|---|---|---|")
    for name, (now, before, of_gpus) in cases(width, device).items():
        if of_gpus and not device.startswith("cuda"):
            print(f"| {name} | not run: it differs on a GPU only | | |")
            continue
        once(now), once(before)
        times = [(once(now), once(before)) for _ in range(REPEATS)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {1e3 * ours:.2f} ms | {1e3 * theirs:.2f} ms | {ours / theirs:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--needs", choices=["diagonal", "gram"], default="diagonal")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    if options.parts:
        compare_parts(options.width, options.device)
        return

    model = load_model(find_source(options.model), device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    windows = torch.randint(0, vocabulary, (options.nsamples, options.seqlen), generator=generator)
    theirs = BlockwisePass(model, windows, 1)
    ours = BlockwisePass(model, windows, max(1, TOKENS_AT_ONCE["cpu"] // options.seqlen))

    published, mine = [], []
    for block in range(options.blocks):
        published.append(timed(lambda block=block: published_block(theirs, block, options.needs)))
        mine.append(timed(lambda block=block: ours_block(ours, block, options.needs)))
        print(f"block {block}: published {published[-1]:.2f} s, ours {mine[-1]:.2f} s, {mine[-1] / published[-1]:.2f}")
    torch.testing.assert_close(torch.cat(list(ours.hidden)), torch.cat(list(theirs.hidden)), rtol=1e-3, atol=1e-3)

    # A pass multiplies by every weight once a token and attends to half of the square of the window; the collecting
    # pass needs no last matrix; a Gram of each distinct input is half a product with itself.
    matrices, tokens = model.matrices_of(0), windows.numel()
    weights = sum(m.size for m in matrices)
    hidden = ours.hidden[0].shape[-1]
    operations = tokens * (2 * (2 * weights + 2 * options.seqlen * hidden) - 2 * matrices[-1].size)
    if options.needs == "gram":
        distinct = {id(s): s for s in ours.collect(0, matrices, "gram").values()}.values()
        operations += sum(tokens * len(s.sum_squares) ** 2 for s in distinct)
    bound = operations / rate()
    median = statistics.median(mine)
    print(f"median ratio {statistics.median(a / b for a, b in zip(mine, published, strict=True)):.2f}")
    print(f"bound {bound:.2f} s a block at {rate() / 1e9:.0f} GFLOP/s; ours takes {median / bound:.2f} times that")


if __name__ == "__main__":
    main()
