"""Times alpha_peak against the published recipe, in turn, on matrices of LLaMA-7B's shapes.

The published recipe: singular values in float32 (torch.linalg.svdvals), then a Python loop over the candidate tails.
Prints the ratios, how well the alphas agree, and the share of the arithmetic bound: n^2 m operations for the Gram
matrix and 4/3 n^3 for the tridiagonal form, at the machine's own rate of float64 matrix products. Then WeightWatcher,
once, on a 1024 x 1024 matrix (its fit over every tail, `alpha`).

    python script/benchmark/esd.py [--shapes 4096x4096 11008x4096] [--repeat 3]
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib.esd import Spectrum, published_precision
from lib.memory import keep_freed_memory
from lib.metrics import METRICS


def timed(function):
    begin = time.perf_counter()
    value = function()
    return time.perf_counter() - begin, value


def published_alpha_peak(weight: torch.Tensor) -> float:
    """The recipe of METHODS in its published form: one candidate at a time, float32."""
    lam = torch.linalg.svdvals(weight.float()).square().sort().values
    logs, size = lam.log(), len(lam)
    tens = lam.log10()
    counts = torch.histc(tens, bins=100, min=float(tens.min()), max=float(tens.max()))
    x = 10 ** torch.linspace(float(tens.min()), float(tens.max()), 101)[counts.argmax()]
    low, high = torch.log10(0.95 * x), 1.5 * x
    best, best_alpha = torch.inf, math.nan
    for i in range(size - 1):
        if lam[i] < low or lam[i] > high:
            continue
        n = size - i
        alpha = 1 + n / (logs[i:].sum() - n * logs[i])
        distance = (1 - (lam[i:] / lam[i]) ** (1 - alpha) - torch.arange(n) / n).abs().max()
        if alpha > 1 and distance < best:
            best, best_alpha = float(distance), float(alpha)
    return best_alpha


def ours(weight: torch.Tensor, metric: str = "alpha_peak") -> float:
    return METRICS[metric].score(Spectrum(published_precision(weight)))


def heavy_tailed(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Student-t entries of three degrees of freedom, as wide as a trained layer's, in float16's values."""
    torch.manual_seed(seed)
    return (torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02).half().float()


def rate() -> float:
    """Operations a second of float64 matrix products, best of three."""
    a = torch.randn(3000, 3000, dtype=torch.float64)
    return 2 * 3000**3 / min(timed(lambda: a @ a)[0] for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads")
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        small, large = sorted((rows, columns))
        theirs, mine, errors = [], [], []
        for seed in range(options.repeat):
            weight = heavy_tailed(rows, columns, seed)
            seconds, expected = timed(lambda weight=weight: published_alpha_peak(weight))
            theirs.append(seconds)
            seconds, found = timed(lambda weight=weight: ours(weight))
            mine.append(seconds)
            errors.append(abs(found / expected - 1))
        bound = (small**2 * large + 4 / 3 * small**3) / rate()
        ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
        print(
            f"{shape}: published {statistics.median(theirs):.2f} s, ours {statistics.median(mine):.2f} s: {ratio:.2f} "
            f"times as fast; alphas differ by {', '.join(f'{error:.0e}' for error in errors)}; bound {bound:.2f} s, "
            f"{bound / statistics.median(mine):.0%} of it reached"
        )

    import weightwatcher

    weight = heavy_tailed(1024, 1024, 0)
    layer = torch.nn.Linear(1024, 1024, bias=False)
    layer.weight.data = weight
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
    mine = statistics.median(timed(lambda: ours(weight, "alpha"))[0] for _ in range(5))
    for options in ({}, {"mp_fit": True, "randomize": True}):  # the second as the published code calls it
        seconds, details = timed(lambda options=options: watcher.analyze(**options))
        agree = abs(ours(weight, "alpha") / float(details["alpha"].iloc[0]) - 1)
        print(
            f"1024x1024, alpha: WeightWatcher.analyze({options}) {seconds:.2f} s, ours {mine:.3f} s: "
            f"{seconds / mine:.0f} times as fast; alphas agree to {agree:.1e}"
        )


if __name__ == "__main__":
    main()
