"""Times products with pruned matrices, and a pruned model that generates, with their zeros and without.

    python script/benchmark/decode.py OUT [--repeat 15] [--shapes 4096x4096] [--batches 1] [--models SCRATCH]
                                      [--kernel avx2]

For each shape, sparsity and batch: dense float32, dense bfloat16, torch's CSR (float32) and packed bfloat16, in turn,
from memory and not from caches; medians, of the ratios too. With --models, random Llamas of a billion parameters, of 70
and 80 % zeros, are written to SCRATCH and continue a text. OUT/products.csv and OUT/models.csv grow by a row as each is
measured, and what they hold is not measured again; OUT/table.md and OUT/speedup.png are made from them. --kernel takes
what a lesser processor than this one would.
"""

import argparse
import csv
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from lib.sparse import Packed, SparseLinear, cpu, kernels
from lib.sparse.choice import TOKENS, cold_copies, fastest
from lib.sparse.format import bytes_per_weight
from lib.sparse.linear import PACK

SHAPES = ("576x576", "1536x576", "2048x2048", "4096x4096", "11008x4096", "4096x11008")
SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4")
METHODS = ("float32", "bfloat16", "csr", "packed")
PRODUCTS = ("shape", "sparsity", "batch", *(f"{name} ms" for name in METHODS), "to bfloat16", "to float32", "ceiling",
            "most_tokens", "machine")  # fmt: skip
MODELS = ("sparsity", "held", "first token s", "tokens/s", "weights GB", "peak GB", "machine")
LLAMA = ("--hidden", "2304", "--intermediate", "6144", "--blocks", "16")  # 1.05 billion


def machine() -> str:
    """The processor, the kernel chosen for it, and the threads."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    name = " ".join((found[1] if found else platform.processor()).split())
    return f"{name}, {cpu.variant_for(torch.bfloat16).name}, {torch.get_num_threads()} threads"


def random_matrix(rows: int, columns: int, sparsity: str) -> torch.Tensor:
    """In bfloat16; 2:4 has two zeros anywhere in every four."""
    weight = torch.randn(rows, columns).bfloat16()
    if sparsity == "2:4":
        zeros = torch.rand(rows, columns // 4, 4).argsort(-1).view(rows, columns) < 2
    else:
        zeros = torch.rand(rows, columns) < float(sparsity)
    return weight.masked_fill_(zeros, 0)


def methods(weight: torch.Tensor, batch: int) -> tuple[dict[str, list[Callable]], int]:
    """Each method as calls that take turns with its copies of the matrix; the most tokens that the kernel is given."""
    x = torch.randn(batch, weight.shape[1]).bfloat16()
    make = lambda form: SparseLinear(PACK[form](weight), None, torch.bfloat16)  # noqa: E731
    layer = fastest(make, weight) or make(Packed)
    as_float, plain = x.float(), weight.float()
    csr = plain.to_sparse_csr()
    size = sum(part.nbytes for part in (csr.crow_indices(), csr.col_indices(), csr.values()))
    return {
        "float32": [lambda w=w: F.linear(as_float, w) for w in cold_copies(plain.clone, plain.nbytes)],
        "bfloat16": [lambda w=w: F.linear(x, w) for w in cold_copies(weight.clone, weight.nbytes)],
        "csr": [lambda w=w: w @ as_float.T for w in cold_copies(csr.clone, size)],
        "packed": [lambda own=own: own(x) for own in cold_copies(layer.copy, layer.packed.bytes)],
    }, layer.max_tokens


def shape_of(text: str) -> str:
    """As --shapes takes it; argparse says in one line what does not fit."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: is no OUTxIN, such as 4096x4096")
    return text


@torch.no_grad()
def measure(shape: str, sparsity: str, batch: int, repeat: int) -> dict:
    """A row of products.csv."""
    torch.manual_seed(0)
    weight = random_matrix(*map(int, shape.split("x")), sparsity)
    calls, most = methods(weight, batch)
    seconds = {name: [] for name in calls}
    turns = max(repeat, min(map(len, calls.values())) // 4)
    for turn in range(turns + 1):
        for name, own in calls.items():
            call = own[turn % len(own)]
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    ceiling = 2 / bytes_per_weight(1 - float(weight.count_nonzero()) / weight.numel())
    row = {f"{name} ms": f"{1e3 * value:.4f}" for name, value in found.items()}
    for name in ("bfloat16", "float32"):  # turn by turn, as a machine's speed drifts
        ratios = [other / own for other, own in zip(seconds[name], seconds["packed"], strict=True)]
        row[f"to {name}"] = f"{statistics.median(ratios):.2f}"
    return {
        "shape": shape,
        "sparsity": sparsity,
        "batch": batch,
        **row,
        "ceiling": f"{ceiling:.2f}",
        "most_tokens": most,
    }


def generate(folder: Path, sparsity: str, held: str) -> dict:
    """A row of models.csv, of a process of its own."""
    if not (folder / "config.json").is_file():
        script = Path(__file__).parents[1] / "random_checkpoint.py"
        subprocess.run([sys.executable, script, folder, *LLAMA, "--sparsity", sparsity], check=True)
    kind, _, dtype = held.partition(" ")
    flags = ["--dtype", dtype] + ["--dense"] * (kind == "dense")
    script = Path(__file__).parents[1] / "generate.py"
    done = subprocess.run(
        [sys.executable, script, "--model", folder, "--prompt", "Once upon a time", "--max_new_tokens", "48", *flags],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first, rate, weights, peak = done.stdout.strip().splitlines()[-1].strip("| ").split(" | ")[1:]
    return {
        "sparsity": sparsity, "held": held, "first token s": first, "tokens/s": rate, "weights GB": weights,
        "peak GB": peak,
    }  # fmt: skip


def fill(
    file: Path, columns: tuple[str, ...], keys: tuple[str, ...], wanted: list[tuple], make: Callable
) -> list[dict]:
    """The rows of a table, those that it lacks made and put down one by one."""
    rows = list(csv.DictReader(file.open())) if file.is_file() else []
    if others := {row["machine"] for row in rows} - {machine()}:
        raise SystemExit(f"{file}: holds rows of {others.pop()}, and this is {machine()}; give another folder")
    known = {tuple(row[key] for key in keys) for row in rows}
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, columns)
        if not rows:
            writer.writeheader()
        for key in wanted:
            if tuple(map(str, key)) not in known:
                row = {name: str(value) for name, value in (make(*key) | {"machine": machine()}).items()}
                writer.writerow(row)
                out.flush()
                rows.append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items() if name != "machine"), flush=True)
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """Speed-up over dense bfloat16 against sparsity, a line a shape, a panel a batch, and what bytes alone allow."""
    batches = sorted({int(row["batch"]) for row in rows})
    figure = Figure(figsize=(4.6 * len(batches), 4.2), layout="constrained")
    figure.suptitle(f"packed against dense bfloat16: {rows[0]['machine']}")
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        own = [row for row in rows if int(row["batch"]) == batch and row["sparsity"] != "2:4"]
        for shape in dict.fromkeys(row["shape"] for row in own):
            points = sorted((float(r["sparsity"]), float(r["to bfloat16"])) for r in own if r["shape"] == shape)
            axis.plot(*zip(*points, strict=True), marker="o", label=shape)
        every = [0.5 + 0.01 * i for i in range(41)]
        axis.plot(every, [2 / bytes_per_weight(s) for s in every], "k--", label="ceiling by bytes")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"batch {batch}", xlabel="sparsity", ylabel="times as fast")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def tables(products: list[dict], models: list[dict]) -> str:
    """Times as fast as dense bfloat16, and in brackets as dense float32, by batch; and the models."""
    text = f"{products[0]['machine']}\n"
    for batch in sorted({int(row["batch"]) for row in products}):
        own = {(row["shape"], row["sparsity"]): row for row in products if int(row["batch"]) == batch}
        shapes, sparsities = (list(dict.fromkeys(key[i] for key in own)) for i in (0, 1))
        text += f"\nbatch {batch}\n\n| | {' | '.join(sparsities)} |\n{'|---' * (len(sparsities) + 1)}|\n"
        for shape in shapes:
            cells = (own.get((shape, sparsity)) for sparsity in sparsities)
            told = [f"{row['to bfloat16']} ({row['to float32']})" if row else "" for row in cells]
            text += f"| {shape} | {' | '.join(told)} |\n"
        ceilings = {row["sparsity"]: row["ceiling"] for row in own.values()}
        text += f"| ceiling by bytes | {' | '.join(ceilings[sparsity] for sparsity in sparsities)} |\n"
    if models:
        text += f"\n| {' | '.join(MODELS[:-1])} |\n{'|---' * (len(MODELS) - 1)}|\n"
        text += "".join(f"| {' | '.join(row[name] for name in MODELS[:-1])} |\n" for row in models)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES)
    parser.add_argument("--sparsities", nargs="+", default=SPARSITIES)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4, max(TOKENS)))
    parser.add_argument("--models", type=Path, help="folder for the random checkpoints, 2 GB each")
    parser.add_argument("--kernel", choices=[variant.name for variant in kernels.VARIANTS])
    options = parser.parse_args()
    if options.kernel:
        needs = next(variant.needs for variant in kernels.VARIANTS if variant.name == options.kernel)
        if lacking := needs - cpu.features():
            parser.error(f"--kernel {options.kernel}: this processor lacks {', '.join(sorted(lacking))}")
        cpu.features = lambda: needs
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(s, z, b) for s in options.shapes for z in options.sparsities for b in options.batches]
    rows = fill(
        options.out / "products.csv", PRODUCTS, PRODUCTS[:3], wanted, lambda *key: measure(*key, options.repeat)
    )
    draw(rows, options.out / "speedup.png")
    models: list[dict] = []
    if options.models:
        held = [(s, h) for s in ("0.7", "0.8") for h in ("dense float32", "dense bfloat16", "sparse bfloat16")]
        make = lambda sparsity, held: generate(options.models / f"llama-{sparsity}", sparsity, held)  # noqa: E731
        models = fill(options.out / "models.csv", MODELS, MODELS[:2], held, make)
    (options.out / "table.md").write_text(tables(rows, models))


if __name__ == "__main__":
    main()
