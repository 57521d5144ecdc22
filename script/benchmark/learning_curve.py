"""Perplexity against calibration tokens: leaderboards that differ in --nsamples, as one picture.

    for n in 32 64 128; do
        python script/benchmark/leaderboard.py LIST --save curve/$n --eval_data ... -- \\
            ... --nsamples $n --recover_nsamples $n
    done
    python script/benchmark/learning_curve.py curve/* --save curve.png

A panel is an evaluation text, a line a method at a sparsity, a point the mean over its seeds.
"""

import argparse
import csv
import re
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lib.plots import set_perplexity_axis

PERPLEXITY = "perplexity_"
ERROR = "learning_curve.py: error:"

Curves = dict[tuple[str, str], dict[int, list[float]]]  # (text, method) -> tokens -> perplexities


def protocol(folder: Path) -> tuple[int, int, list[str]]:
    """The calibration windows of a leaderboard's runs, their tokens each, and what else the runs have in common."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("nsamples", "seqlen", "recover_nsamples"):
        parser.add_argument(f"--{name}", type=int)
    found, others = parser.parse_known_args(shlex.split((folder / "protocol.txt").read_text(encoding="utf-8")))
    if not (found.nsamples and found.seqlen):
        raise SystemExit(f"{ERROR} {folder}: its runs have no --nsamples, or no --seqlen (protocol.txt)")
    return found.nsamples, found.seqlen, others


def read(folders: list[Path]) -> Curves:
    """What the leaderboards in these folders hold, but for the dense model.

    That recovery trained on as many windows as there are to calibrate on goes without saying.
    """
    curves, shared = {}, None
    for folder in folders:
        if missing := [name for name in ("protocol.txt", "runs.csv") if not (folder / name).is_file()]:
            raise SystemExit(f"{ERROR} {folder}: no leaderboard is there ({missing[0]})")
        nsamples, *others = protocol(folder)
        if others != (shared := shared or others):
            raise SystemExit(f"{ERROR} {folder}: its runs differ in more than --nsamples from those of {folders[0]}")
        with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if float(row["sparsity"])]
        for row in rows:
            settings = re.sub(rf" ?--recover_nsamples {nsamples}\b", "", row["settings"])
            method = " ".join(filter(None, [row["method"], settings, f"at {100 * float(row['sparsity']):g} %"]))
            for column in row:
                if column.startswith(PERPLEXITY):
                    curve = curves.setdefault((column.removeprefix(PERPLEXITY), method), {})
                    curve.setdefault(nsamples * others[0], []).append(float(row[column]))
    if not curves:
        raise SystemExit(f"{ERROR} {folders[0]}: its runs prune nothing")
    return curves


def draw(curves: Curves) -> Figure:
    texts, methods = dict.fromkeys(text for text, _ in curves), dict.fromkeys(method for _, method in curves)
    figure = Figure(figsize=(5 * len(texts), 5), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for method in methods:
            points = sorted(curves.get((text, method), {}).items())
            axes.plot([t for t, _ in points], [statistics.fmean(p) for _, p in points], marker="o", label=method)
        ticks = sorted({tokens for (own, _), curve in curves.items() if own == text for tokens in curve})
        axes.set(xscale="log", xlabel="calibration tokens")
        set_perplexity_axis(axes, text)
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k"))
        axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", nargs="+", type=Path, help="folders that script/benchmark/leaderboard.py wrote")
    parser.add_argument("--save", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    draw(read(options.boards)).savefig(options.save, dpi=120)


if __name__ == "__main__":
    main()
