"""Writes docs/flags.md: what every command takes, out of the fields that its flags are made of.

python script/document_flags.py [FILE]
"""

import argparse
import re
import sys
from dataclasses import Field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from generate import GenerateFlags

from lib.config import RunConfig
from lib.finetune.config import FinetuneConfig
from lib.flags import Flags, default_of, spellings
from lib.registry import LISTED

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
HEAD = """# Flags

What each command takes, by what one is doing; flags of the published code come first. This page is what `--help` says,
written by `python script/document_flags.py`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_command(kind) for kind in (RunConfig, FinetuneConfig, GenerateFlags))])


def _command(kind: type[Flags]) -> str:
    lines = [f"## {kind.command}", "", kind.purpose, ""]
    for group, items in kind.groups().items():
        lines += [f"### {group.capitalize()}", "", "| flag | default | meaning |", "|---|---|---|"]
        lines += [f"| {_names(item)} | {_default(item)} | {_meaning(item)} |" for item in items]
        lines.append("")
    return "\n".join(lines)


def _names(item: Field) -> str:
    return ", ".join(f"`{name}`" for name in spellings(item))


def _default(item: Field) -> str:
    if isinstance(item.default, bool):
        return "on" if item.default else "off"
    shown = default_of(item)
    return _marked(shown) if "shown" in item.metadata or not shown else f"`{shown}`"


def _meaning(item: Field) -> str:
    choices = item.metadata["choices"]() if "choices" in item.metadata else []
    text = _marked(item.metadata["help"])
    if len(choices) > LISTED:
        return f"{text}; `--help` lists them"
    return f"{text}; one of {', '.join(f'`{word}`' for word in choices)}" if choices else text


def _marked(text: str) -> str:
    """Flags, files, patterns of names and the like as code."""
    return re.sub(r"(--[\w-]+|\*[._]\w+|\w*\.(?:csv|gguf|html|json|py|yaml)\b|\bc4:PATH\b)", r"`\1`", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "file", type=Path, nargs="?", default=PAGE, metavar="FILE", help="the page (default: docs/flags.md)"
    )
    parser.parse_args().file.write_text(page(), encoding="utf-8")
