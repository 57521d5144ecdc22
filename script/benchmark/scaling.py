"""What a streamed run needs, by formula: operations, memory, disk and network, for model shapes and machines.

    python script/benchmark/scaling.py                  the tables of docs/scaling.md
    python script/benchmark/scaling.py --check RUN.json a finished streamed run's memory beside the formula's

The formulas are spelled out in docs/scaling.md.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A Llama: width d, inner width f, width of keys and values k, blocks L, vocabulary V."""

    d: int
    f: int
    k: int
    blocks: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of one block's."""
        d, f, k = self.d, self.f, self.k
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def block(self) -> int:
        """Parameters of a block's matrices."""
        return sum(out * into for out, into in self.matrices)

    @property
    def rest(self) -> int:
        """Parameters outside the blocks."""
        return self.vocabulary * self.d * (1 if self.tied else 2)

    @property
    def inputs(self) -> list[int]:
        """Widths of the distinct tensors that a block's matrices read."""
        return [self.d, self.d, self.d, self.f]


@dataclass(frozen=True)
class Machine:
    """Rates are what is assumed to be reached, not peaks; `ranks` processes with one GPU each."""

    ranks: int
    products: float  # operations a second of the model's matrix products, each rank
    float64: float  # of float64 decompositions, each rank
    disk: float  # bytes a second, all ranks together
    network: float  # bytes a second between ranks


MODELS = {
    "7B": Shape(4096, 11008, 4096, 32, 32000),
    "70B": Shape(8192, 28672, 1024, 80, 32000),
    "405B": Shape(16384, 53248, 1024, 126, 128256),
}
MACHINES = {
    "one 24 GB GPU": Machine(1, 80e12, 0.4e12, 2e9, 1e99),
    "8 x 80 GB": Machine(8, 350e12, 2e12, 6e9, 200e9),
    "8 nodes of 8 x 80 GB": Machine(64, 350e12, 2e12, 20e9, 25e9),
}
# Bytes that a pruner takes at most on a GPU beside a matrix and its statistics: a weight, and w^2 of its input's width.
PRUNING = {"magnitude": (16, 0), "wanda": (16, 0), "ria": (24, 0), "sparsegpt": (12, 12), "alps": (48, 12)}
FIXED = 0.45e9  # bytes of Python, torch and transformers before a model is there


def memory(shape: Shape, *, value: int, windows: int, seqlen: int, gram: bool) -> dict[str, float]:
    """Bytes by part; `value` is the size of one number of the model."""
    largest = max(out * into for out, into in shape.matrices)
    statistics = sum(4 * (n * n if gram else n) for n in shape.inputs)
    return {
        "libraries": FIXED,
        "embeddings and head": value * shape.rest,
        "resident block": value * shape.block,
        # Wanda: scores, order statistics and mask; SparseGPT: the matrix in float32, its mask and the result
        "pruning the largest matrix": (16 if gram else 24) * largest,
        "statistics": statistics,
        "factor of the widest input": 12 * max(shape.inputs) ** 2 if gram else 0.0,
        "activations": value * windows * seqlen * shape.d,
    }


def operations(shape: Shape, *, tokens: int, seqlen: int, gram: bool) -> dict[str, float]:
    """Of each stage, over all blocks."""
    a_pass = tokens * (2 * shape.block + 2 * seqlen * shape.d)
    spectra = sum(min(m) ** 2 * (max(m) + 4 / 3 * min(m)) for m in shape.matrices)
    solving = sum(out * into**2 for out, into in shape.matrices) + sum(2 / 3 * n**3 for n in shape.inputs)
    return {
        "spectra": shape.blocks * spectra,
        "statistics": shape.blocks * (a_pass + (sum(5 / 4 * tokens * n * n for n in shape.inputs) if gram else 0)),
        "propagation": shape.blocks * a_pass,
        "solving": shape.blocks * solving if gram else 0.0,
    }


def table(windows: int, seqlen: int) -> None:
    for model, shape in MODELS.items():
        parameters = shape.blocks * shape.block + shape.rest
        need = memory(shape, value=2, windows=windows, seqlen=seqlen, gram=True)
        host = need.pop("activations")
        work = operations(shape, tokens=windows * seqlen, seqlen=seqlen, gram=True)
        print(f"\n### {model}: {parameters / 1e9:.1f} billion parameters, {2 * parameters / 1e9:.0f} GB in 16 bits\n")
        print(f"On the GPU {sum(need.values()) / 1e9:.1f} GB (" + ", ".join(
            f"{part} {size / 1e9:.1f}" for part, size in need.items() if part != "libraries"
        ) + f"); on the host or in a file {host / 1e9:.1f} GB of activations.\n")  # fmt: skip
        print("| | spectra | two passes | solving | disk | network | all |")
        print("|---|---|---|---|---|---|---|")
        for name, machine in MACHINES.items():
            share = machine.ranks
            seconds = {
                "spectra": work["spectra"] / share / machine.float64,
                "passes": (work["statistics"] + work["propagation"]) / share / machine.products,
                "solving": work["solving"] / min(share, 4) / (machine.products / 10),
                # read for the digest, the spectra, the probe and the pruning; written; read to count and to evaluate
                "disk": 7 * 2 * parameters / machine.disk,
                "network": 0.0,
            }
            if share > 1:
                moved = 2 * sum(4 * n * n for n in shape.inputs) + 2 * shape.block
                seconds["network"] = shape.blocks * moved / machine.network
            print(f"| {name} | " + " | ".join(map(spell, [*seconds.values(), sum(seconds.values())])) + " |")


def spell(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def check(path: Path) -> None:
    """Print a run's memory and the formula's."""
    record = json.loads(path.read_text())
    kinds = {layer["name"].rpartition(".")[2]: layer["shape"] for layer in record["layers"]}
    d, blocks = kinds["q_proj"][1], record["model"]["blocks"]
    rest = record["model"]["parameters"] - record["model"]["prunable_parameters"]
    shape = Shape(d, kinds["up_proj"][0], kinds["k_proj"][0], blocks, rest // (2 * d))
    config, value = record["config"], 4 if record["environment"]["dtype"] == "float32" else 2
    need = memory(
        shape, value=value, windows=config["nsamples"], seqlen=config["seqlen"],
        gram=config["prune_method"].startswith("sparsegpt"),
    )  # fmt: skip
    for part, size in need.items():
        print(f"{part:28}{size / 1e9:8.2f} GB")
    measured = record["peak_memory_bytes"]["process"]
    print(f"{'formula':28}{sum(need.values()) / 1e9:8.2f} GB\n{'measured':28}{measured / 1e9:8.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    check(options.check) if options.check else table(options.nsamples, options.seqlen)


if __name__ == "__main__":
    main()
