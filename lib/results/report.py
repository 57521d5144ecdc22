"""report.html: one run's table, settings and pictures in one file that opens from disk."""

import base64
from html import escape
from pathlib import Path

from .. import ranks
from .files import write_bytes, write_text
from .run import flatten_scores, summary

PLANNED = "sparsity-depth"  # the picture of a run's sparsities
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
pre { background: #f5f5f3; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.35 }
table { border-collapse: collapse; font-size: 13px } th { text-align: left }
td, th { padding: 2px 14px 2px 0; border-bottom: 1px solid #e4e4e0; font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto } details { margin: 1em 0 } summary { cursor: pointer }
"""


def write_report(folder: Path, record: dict, scores: dict[str, dict[str, float]], esds: dict[str, dict]) -> None:
    """Draw the run's pictures into `folder`/plots and put all of them into `folder`/report.html.

    record is run.json; scores {metric: {matrix: score}}; esds as lib/quality.py fills them.
    """
    if not ranks.is_main():
        return
    from ..plots import draw_esds, draw_scores, draw_sparsities  # matplotlib is slow to import

    layers = record["layers"]
    figures = {f"{metric}-depth": draw_scores(layers, values, metric) for metric, values in scores.items()}
    if record["sparsity"]:
        figures[PLANNED] = draw_sparsities(layers, record["sparsity"]["target"])
    if esds:
        drawn = next(iter(esds.values()))["metric"]
        figures |= {f"esd-{kind}": page for kind, page in draw_esds(layers, esds, drawn).items()}
    write_text(folder / "report.html", _page(record, _write_pictures(folder, figures)))


def draw_plan(folder: Path, record: dict) -> None:
    """Draw the planned sparsities into `folder`/plots/sparsity-depth.png."""
    if ranks.is_main():
        from ..plots import draw_sparsities

        _write_pictures(folder, {PLANNED: draw_sparsities(record["layers"], record["sparsity"]["target"])})


def _write_pictures(folder: Path, figures: dict) -> dict[str, bytes]:
    """Each figure's PNG, written into `folder`/plots under its name."""
    from ..plots import png

    pictures = {name: png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        write_bytes(folder / "plots" / f"{name}.png", picture)
    return pictures


def _page(record: dict, pictures: dict[str, bytes]) -> str:
    title = escape(f"AlphaPruning: {record['run']}")
    images = "\n".join(
        f'<h2>{escape(name)}</h2>\n<img alt="{escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    layers = [flatten_scores(layer) for layer in record["layers"]]
    events = [[event["matrix"] or "", event["message"]] for event in record["events"]]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<pre>{escape(summary(record).strip())}</pre>
{_table(["matrix", "event"], events) if events else ""}
{images}
<h2>Settings and provenance</h2>
<details><summary>flags</summary>{_table(["flag", "value"], record["config"].items())}</details>
<details><summary>model</summary>{_table(["", ""], record["model"].items())}</details>
<details><summary>seconds by stage</summary>{_table(["stage", "seconds"], record["seconds"].items())}</details>
<details><summary>environment</summary>{_table(["", ""], record["environment"].items())}</details>
<details><summary>every matrix</summary>{_table(layers[0], [layer.values() for layer in layers])}</details>
</body></html>
"""


def _table(header, rows) -> str:
    def cell(value) -> str:
        return escape(f"{value:.5g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{escape(str(name))}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"
