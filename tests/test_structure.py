"""The rules of the layout, read off the source."""

import ast
import dataclasses
import re

import forking
import pytest
from shared import ROOT

from lib.allocation import ALLOCATIONS
from lib.config import RunConfig, prune_methods
from lib.finetune.config import FinetuneConfig
from lib.flags import flag_of
from lib.metrics import METRICS
from lib.options import options_of
from lib.pruners import PRUNERS
from lib.run_flags import OPTIONED

FILES = [ROOT / "main.py", *sorted((ROOT / "lib").rglob("*.py"))]
FAMILIES = ("metrics", "allocation", "pruners")


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path) -> set[str]:
    """Full names of the project's modules that a file imports."""
    found, package = set(), list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *filter(None, [node.module])]))
    return {name for name in found if name.startswith("lib")}


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_allocations_and_pruners_do_not_import_each_other(family):
    others = tuple(f"lib.{name}" for name in (*FAMILIES, "model", "sequential", "config", "cli") if name != family)
    for path in (ROOT / "lib" / family).glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith(others)], path


def test_only_the_command_line_sees_argparse():
    for path in FILES:
        if path.name != "cli.py":
            assert "argparse" not in path.read_text(), path


def test_only_results_writes_files():
    writers = re.compile(
        r"write_text|write_bytes|save_pretrained\(|numpy\.save|torch\.save|open\([^)]*['\"][wax]|\.mkdir\("
    )
    others = {"known_models.py", "memory.py"}  # which put a package's parts together, and write to /proc
    for path in FILES:
        if path.parent.name != "results" and path.name not in others:
            assert not writers.search(re.sub(r'"[^"\n]*"', '""', path.read_text())), path


def test_only_model_knows_architectures():
    known = re.compile(r"\b(llama|opt|gpt2|falcon|mixtral|qwen|gemma|phi3?|Conv1D)\b", re.IGNORECASE)
    for path in FILES:
        if path.name in ("model.py", "experts.py"):
            continue
        tree = ast.parse(path.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        }
        assert not [name for name in names if known.search(name)], path


def test_only_the_loop_and_its_pass_call_blocks():
    for path in FILES:
        if path.name not in ("sequential.py", "blockwise.py", "model.py", "shards.py"):
            assert not re.search(r"blocks\[", path.read_text()), path


def test_main_tells_the_story_in_a_hundred_lines_or_so():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 150


def test_modules_have_one_subject():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_global_device():
    for path in FILES:
        assert "cuda:0" not in path.read_text(), path


def test_readme_names_every_method():
    readme = (ROOT / "README.md").read_text()
    methods = (ROOT / "docs/methods.md").read_text()
    for name in (*PRUNERS, *METRICS, *(set(ALLOCATIONS) - {"uniform"}), "wanda_ww"):
        assert f"`{name}`" in readme, name
        assert f"`{name}`" in methods, name


@pytest.mark.parametrize("kind", [RunConfig, FinetuneConfig])
def test_the_page_of_flags_names_every_flag(kind):
    page = (ROOT / "docs/flags.md").read_text().partition(f"\n## {kind.command}\n")[2].partition("\n## ")[0]
    table = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `--")]
    assert sorted(table) == sorted(flag_of(item) for item in dataclasses.fields(kind))


def test_the_page_of_flags_is_what_the_command_writes(tmp_path):
    done = forking.run("script/document_flags.py", [str(tmp_path / "flags.md")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flags.md").read_text() == (ROOT / "docs/flags.md").read_text(), (
        "python script/document_flags.py"
    )


def test_options_are_known_to_their_own_files_only():
    """But for the published --epsilon, which results.tsv has a column for."""
    shared = [ROOT / "lib" / name for name in ("config.py", "run_flags.py", "flags.py", "cli.py", "plan.py")]
    for name in options_of(*OPTIONED).keys() - {"epsilon", "sparsities"}:
        for path in shared:
            assert name not in path.read_text(), (name, path)


def test_methods_are_all_pairs():
    assert len(prune_methods()) == len(list(PRUNERS)) * len(list(ALLOCATIONS))


def test_the_page_on_design_maps_every_file():
    page = (ROOT / "docs/design.md").read_text()
    scripts = [path for path in (ROOT / "script").rglob("*.*") if path.suffix != ".pyc" and not path.is_symlink()]
    for path in [*(ROOT / "lib").glob("*.py"), *(ROOT / "lib/results").glob("*.py"), *scripts]:
        if path.name != "__init__.py":
            assert path.name in page, path.name
    mapped = re.findall(r"^      (\w+\.py) ", page, re.MULTILINE)
    assert len(mapped) == len(set(mapped))
