"""Layer errors and seconds of pruners on every matrix of a model, from the same statistics (the dense model's inputs).

    python script/benchmark/pruners.py --model smollm2 --calib_data VALIDATION.txt --nsamples 64 --seqlen 512

The error is ||X (W - W_0)^T||^2 / ||X W_0^T||^2. Prints, by sparsity and pruner, the mean over the matrices, the
seconds, and on how many matrices the error is above that of --against.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import PRUNERS, Pattern, calibration_windows, find_source, load_model, load_tokenizer
from lib.sequential import walk


def relative_error(weight, dense, gram) -> float:
    """||X (W - W_0)^T||^2 / ||X W_0^T||^2 from G = X^T X."""
    change = weight.float() - dense.float()
    return float(((change @ gram) * change).sum() / ((dense.float() @ gram) * dense.float()).sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calib_data", default="pydoc")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt", "alps"])
    parser.add_argument("--against", default="sparsegpt")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    options = parser.parse_args()
    source = find_source(options.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, "cpu", "float32", tokenizer)
    windows = calibration_windows(
        options.calib_data, tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=0
    )
    errors, seconds = {}, {}
    for step in walk(model, windows, "gram", batch_size=max(1, 1024 // options.seqlen)):
        for matrix in step.matrices:
            stats = step.stats[matrix.name]
            for sparsity in options.sparsities:
                for name in options.pruners:
                    begin = time.perf_counter()
                    pruned = PRUNERS[name].prune(matrix.weight, stats, sparsity, Pattern())
                    key = (sparsity, name)
                    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - begin
                    error = relative_error(pruned, matrix.weight, stats.gram)
                    errors.setdefault(key, {})[matrix.name] = error
    print("| sparsity | pruner | geometric mean of the errors | seconds | worse than", options.against, "on |")
    print("|---|---|---|---|---|")
    for (sparsity, name), found in errors.items():
        base = errors[sparsity, options.against]
        worse = sum(error > base[matrix] for matrix, error in found.items())
        mean = math.exp(math.fsum(map(math.log, found.values())) / len(found))
        print(f"| {sparsity:g} | `{name}` | {mean:.5f} | {seconds[sparsity, name]:.1f} | {worse} of {len(found)} |")


if __name__ == "__main__":
    main()
