"""Pictures of a run, as matplotlib figures: every matrix's ESD with its power law, and what goes over depth."""

import io
import math
import re

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

PANELS = 96  # of one page at most: past that a page shows blocks evenly spread
BLUE, RED, GREY = "#4878b0", "#c4161c", "0.45"


def kind_of(layer: dict) -> str:
    """What a matrix is inside its block, without the numbers of experts: `mlp.experts.down_proj`."""
    inside = layer["name"].partition(f".{layer['block']}.")[2]
    return re.sub(r"\.\d+(?=\.|$)", "", inside)


def by_kind(layers: list[dict]) -> dict[str, list[dict]]:
    """The layers of each kind, in module order."""
    kinds: dict[str, list[dict]] = {}
    for layer in layers:
        kinds.setdefault(kind_of(layer), []).append(layer)
    return kinds


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def set_perplexity_axis(axis, text: str) -> None:
    """Perplexity on a text upwards, logarithmically, in plain numbers."""
    axis.set(ylabel=f"perplexity, {text}", yscale="log")
    axis.yaxis.set_major_locator(_FewTicks())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))


class _FewTicks(LogLocator):
    """Fewer a decade the more decades there are."""

    def tick_values(self, vmin, vmax):
        decades = math.log10(vmax / vmin)
        self.set_params(subs=(1, 1.5, 2, 3, 5, 7) if decades < 2 else (1, 3) if decades < 4 else (1,))
        return super().tick_values(vmin, vmax)


def draw_esds(layers: list[dict], esds: dict[str, dict], metric: str) -> dict[str, Figure]:
    """kind -> a page with the ESD of that kind of matrix in each block (of experts: the first), on log-log axes.

    esds: matrix name -> histogram and fit (lib/quality.py). Blue: histogram of the eigenvalues; solid red: its
    tail from lam_min; dashed red: the fitted power law.
    """
    pages = {}
    for kind, members in by_kind(layers).items():
        first = list({layer["block"]: layer for layer in reversed(members)}.values())[::-1]
        shown = [first[i] for i in numpy.unique(numpy.linspace(0, len(first) - 1, min(len(first), PANELS), dtype=int))]
        drawn = [layer["name"] for layer in shown]
        columns = min(len(shown), max(3, math.ceil(math.sqrt(1.2 * len(shown)))))
        rows = math.ceil(len(shown) / columns)
        width, height = 2.5 * max(columns, 3) + 0.7, 2.1 * rows + 0.9
        figure = Figure(figsize=(width, height))
        # Fixed margins, in inches: a layout that is computed draws every tick of every panel twice, ten seconds a page.
        figure.subplots_adjust(0.9 / width, 0.7 / height, 1 - 0.1 / width, 1 - 0.75 / height, wspace=0.08, hspace=0.2)
        note = "" if len(first) == len(members) else ", first expert of each block"
        figure.suptitle(
            f"{kind}{note}: eigenvalue density, tail and power-law fit ({metric})", y=1 - 0.15 / height, fontsize=13
        )
        axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        axes[0].set(xscale="log", yscale="log")  # and with it all of them
        axes[0].xaxis.set_minor_locator(NullLocator())
        axes[0].yaxis.set_minor_locator(NullLocator())
        for axis, layer in zip(axes, shown, strict=False):
            _draw_esd(axis, f"block {layer['block']}", esds.get(layer["name"]))
        least = [density[density > 0].min() for density in map(_density, filter(None, map(esds.get, drawn)))]
        axes[0].set_ylim(bottom=min(least, default=1) / 3)
        for axis in axes[len(shown) :]:
            axis.axis("off")
        for axis in axes[max(0, len(shown) - columns) : len(shown)]:
            axis.tick_params(labelbottom=True)  # with nothing below it
        figure.supxlabel(r"eigenvalue $\lambda$ of the smaller Gram matrix", y=0.1 / height, fontsize=11)
        figure.supylabel("density", x=0.1 / width, fontsize=11)
        pages[kind] = figure
    return pages


def _edges(esd: dict) -> numpy.ndarray:
    return numpy.logspace(esd["low"], esd["high"], len(esd["counts"]) + 1)


def _density(esd: dict) -> numpy.ndarray:
    """Of the eigenvalues in each bin."""
    counts = numpy.array(esd["counts"], dtype=float)
    return counts / counts.sum() / numpy.diff(_edges(esd))


def _draw_esd(axis, title: str, esd: dict | None) -> None:
    axis.tick_params(labelsize=8)
    if esd is None:
        axis.set_title(f"{title}: no power law", fontsize=9)
        return
    density, edges = _density(esd), _edges(esd)
    centres = numpy.sqrt(edges[:-1] * edges[1:])
    alpha, start = esd["alpha"], esd["lam_min"]
    seen = density > 0
    axis.stairs(density, edges, fill=True, baseline=1e-30, color=BLUE, alpha=0.75)
    tail = seen & (edges[1:] > start)
    axis.plot(centres[tail], density[tail], color=RED, linewidth=1.6)
    x = numpy.array([start, edges[-1]])
    fitted = esd["tail"] * (alpha - 1) / start * (x / start) ** -alpha
    axis.plot(x, fitted, color=RED, linestyle="--", linewidth=1.4)
    axis.axvline(start, color=RED, linewidth=0.6, alpha=0.6)
    axis.set_title(rf"{title}: $\alpha$ {alpha:.2f}, KS {esd['ks']:.3f}", fontsize=9)


def _depth_figure(title: str, label: str):
    figure = Figure(figsize=(11, 5), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=13)
    axis.set_xlabel("block")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    return figure, axis


def _mean_by_block(layers: list[dict], values: dict[str, float]) -> tuple[list[int], list[float]]:
    """Blocks, and the mean over each one's matrices."""
    blocks: dict[int, list[float]] = {}
    for layer in layers:
        blocks.setdefault(layer["block"], []).append(values[layer["name"]])
    return list(blocks), [sum(found) / len(found) for found in blocks.values()]


def draw_scores(layers: list[dict], scores: dict[str, float], metric: str) -> Figure:
    """The metric over depth: a line for each kind of matrix, and the mean of each block."""
    figure, axis = _depth_figure(f"{metric} over depth, by kind of matrix", metric)
    for kind, members in by_kind(layers).items():
        axis.plot(*_mean_by_block(members, scores), marker=".", linewidth=1, alpha=0.8, label=kind)
    axis.plot(*_mean_by_block(layers, scores), color="black", linewidth=2.6, label="mean of the block")
    axis.legend(fontsize=9, ncols=2)
    return figure


def draw_sparsities(layers: list[dict], target: float) -> Figure:
    """Target and achieved sparsity of every matrix over depth, of a plan its targets, beside uniform pruning."""
    figure, axis = _depth_figure("Sparsity over depth", "share of zeros")
    size = {layer["name"]: math.prod(layer["shape"]) for layer in layers}
    blocks = sorted({layer["block"] for layer in layers})

    def share(key: str) -> list[float]:
        inside = [[layer for layer in layers if layer["block"] == block] for block in blocks]
        return [sum(x[key] * size[x["name"]] for x in xs) / sum(size[x["name"]] for x in xs) for xs in inside]

    axis.axhline(target, color=GREY, linestyle=":", linewidth=1.6, label=f"uniform, {target:g}")
    planned = any(layer["sparsity"] is None for layer in layers)
    axis.scatter(
        [layer["block"] for layer in layers],
        [layer["target_sparsity" if planned else "sparsity"] for layer in layers],
        s=14, color=BLUE, alpha=0.5, label="target of each matrix" if planned else "achieved, each matrix",
    )  # fmt: skip
    axis.plot(blocks, share("target_sparsity"), color=RED, linewidth=2.2, label="target of the block")
    if not planned:
        axis.plot(
            blocks, share("sparsity"), color="black", linestyle="--", linewidth=1.2, label="achieved by the block"
        )
    axis.legend(fontsize=9)
    return figure
