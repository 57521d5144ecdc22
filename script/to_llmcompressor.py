"""A run's sparsities as a recipe of llm-compressor, with one modifier for each sparsity and the matrices that have it.

    python script/to_llmcompressor.py RUN_FOLDER > recipe.yaml
    python script/to_llmcompressor.py layers.csv --modifier wanda > recipe.yaml

RUN_FOLDER is that of any run, of --plan_only too; a table needs every matrix by its name. Give the recipe to
`llmcompressor.oneshot(..., pipeline="sequential")`, which serves all modifiers in one pass over the model: without it
each has a pass of its own. It prunes modules of the class Linear and passes over any other, such as stacks of experts:
a run whose model has others is refused, which a table alone cannot be.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
import yaml
from torch import nn

from lib import Pattern, RunError, find_source
from lib.allocation.budget import exact_multiples
from lib.allocation.file import read_entries
from lib.cli import Parser
from lib.load import load_config
from lib.registry import unknown_name

MODIFIERS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}
PATTERN = frozenset("*?[")


def recipe(path: str, modifier: str | None = None, sparsity_type: str | None = None) -> dict:
    """The recipe for a run's folder or a table, ready for YAML. Raises RunError for what llm-compressor has not.

    modifier       one of MODIFIERS; where nothing is said, the run's pruner
    sparsity_type  as of main.py; where nothing is said, the run's, else unstructured
    """
    entries = read_entries(path, flag="")
    run = entries.path.with_name("run.json")
    settings = json.loads(run.read_text(encoding="utf-8"))["config"] if run.is_file() else {}
    name = modifier or settings.get("prune_method", "").partition("_")[0]
    if modifier and modifier not in MODIFIERS:
        raise unknown_name("--modifier", modifier, MODIFIERS)
    if name not in MODIFIERS:
        why = f"{run} is of {name}, which llm-compressor has not" if name else f"{entries.path} is of no run"
        raise RunError(f"--modifier: is missing; {why}: give one of {', '.join(MODIFIERS)}")
    group = Pattern.parse(sparsity_type or settings.get("sparsity_type") or "unstructured")[0].group
    sparsities = dict(entries.sparsities)
    if loose := next((key for key in sparsities if key.isdecimal() or PATTERN & set(key)), None):
        raise RunError(f"{entries.path}: '{loose}' is no matrix's name; a run with --plan_only writes a table of names")
    if settings:
        check_reach(settings["model"], settings["cache_dir"], sparsities, run)
    if group:
        sparsities = exact_multiples(sparsities, group)
    shares: dict[float, list[str]] = {}
    for matrix, sparsity in sparsities.items():
        shares.setdefault(sparsity, []).append(matrix)
    shares.pop(0.0, None)
    if not shares:
        raise RunError(f"{entries.path}: has no sparsity above 0")
    made = {}
    for number, (sparsity, matrices) in enumerate(shares.items()):
        mask = {"mask_structure": f"{round(sparsity * group)}:{group}"} if group else {}
        made[f"sparsity_{number}_modifiers"] = {MODIFIERS[name]: {"sparsity": sparsity, **mask, "targets": matrices}}
    return {"pruning_stage": made}


def check_reach(model: str, cache_dir: str, matrices: Iterable[str], run: Path) -> None:
    """Raises RunError where llm-compressor would pass over matrices; where the model is gone, says that it is."""
    try:
        config = load_config(find_source(model, cache_dir))
    except RunError as error:
        print(f"{run}: not compared with its model: {error}", file=sys.stderr)
        return
    with torch.device("meta"):
        modules = dict(transformers.AutoModelForCausalLM.from_config(config).named_modules())
    if others := [name for name in matrices if not isinstance(modules.get(name), nn.Linear)]:
        raise RunError(f"{run}: llm-compressor would pass over {len(others)} matrices, such as {others[0]}: no Linear")


def main(arguments: list[str] | None = None) -> int:
    """The command's exit status, as main.py's."""
    parser = Parser(prog="to_llmcompressor.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, or a table of matrix names and sparsities")
    parser.add_argument("--modifier", help=f"one of {', '.join(MODIFIERS)} (default: the run's pruner)")
    parser.add_argument("--sparsity_type", help="unstructured or N:M (default: the run's, else unstructured)")
    try:
        options = parser.parse_args(arguments)
        print(yaml.safe_dump(recipe(options.run, options.modifier, options.sparsity_type), sort_keys=False), end="")
    except RunError as error:
        print(f"to_llmcompressor.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
