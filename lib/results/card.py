"""The model card of a pruned checkpoint: README.md, whose metadata block the hub reads."""

import itertools
import json
import re
import shlex
from dataclasses import Field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import RunConfig
from ..flags import Flags, flag_of
from ..known_models import KNOWN_MODELS

DATASETS = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only"}  # on the hub


def model_card(config: RunConfig, record: dict) -> str:
    """The card of a run's checkpoint, from its run.json; the same for the same result, whenever and wherever made."""
    base, sparsity = base_model(config.model), record["sparsity"]
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "alphapruning", config.prune_method],
        datasets=[DATASETS[config.calib_data]] if config.calibrated and config.calib_data in DATASETS else None,
    )
    name, folder = base or Path(config.model).name, Path(config.save_model).name
    revision = record["model"]["revision"]
    blocks = "\n".join(f"| {index} | {share:.4f} |" for index, share in enumerate(sparsity["blocks"]))
    text = f"""---
{data.to_yaml()}
---

# {name}, {sparsity["achieved"]:.0%} pruned

{sparsity["achieved"]:.2%} of the {record["model"]["prunable_parameters"]:,} prunable weights of {name}\
{f" (revision {revision})" if revision else ""} are zero, removed by AlphaPruning with `{config.prune_method}`; \
{record["model"]["coverage"]:.1%} of the model's parameters are prunable. It is an ordinary checkpoint, with the zeros \
stored as any other value.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})
```

## Perplexity

{_perplexity(record["perplexity"])}
{_accuracies(record.get("zero_shot"))}
## How it was made

    {_command(config, folder)}

with these settings:

| setting | value |
|---|---|
{_settings(config)}

`alphapruning.json` holds all of them, the versions of the libraries, and what happened on the way.

## Sparsity by block

| block | share of zeros |
|---|---|
{blocks}
"""
    return str(ModelCard(text))


def finetuned_card(config: Flags, record: dict) -> str:
    """The card of a fine-tuned checkpoint, or of an adapter, with all the steps that it was made in."""
    steps, first = _steps(config, record), record
    while first.get("pruning"):
        first = first["pruning"]
    base, sparsity, training = base_model(first["config"]["model"]), record["sparsity"], record["training"]
    data = ModelCardData(
        base_model=base if not config.keep_adapter else base_model(config.model),
        library_name="peft" if config.keep_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "alphapruning", "fine-tuned"],
        datasets=[DATASETS[config.data]] if config.data in DATASETS else None,
    )
    name = base or Path(first["config"]["model"]).name
    zeros = (
        "It is an adapter beside the pruned model, which keeps its zeros; merged into it, it would fill them."
        if config.keep_adapter
        else "The zeros are those of the pruned model: fine-tuning has filled none of them "
        f"(digest of their places: `{sparsity['digest']['after'][:16]}`). It is an ordinary checkpoint."
    )
    rows = [
        (what, record[key]["before"], record[key]["after"])
        for key, what in (("loss", "loss on text held out"), ("perplexity", "perplexity"))
        if record[key]
    ]
    table = "\n".join(f"| {what} | {before:.4f} | {after:.4f} |" for what, before, after in rows)
    where = record["perplexity"]
    on = where and f"\n\nPerplexity is on `{Path(where['dataset']).name}`, {where['windows']} windows."
    text = f"""---
{data.to_yaml()}
---

# {name}, {sparsity["after"]:.0%} pruned and fine-tuned

{sparsity["after"]:.2%} of the {record["model"]["prunable_parameters"]:,} prunable weights of {name} are zero, removed \
by AlphaPruning; what is left was fine-tuned on {training["windows"]} windows of {training["seqlen"]} tokens. {zeros}

## Before and after fine-tuning

| | before | after |
|---|---|---|
{table}{on or ""}
{_accuracies(record["zero_shot"])}
## How it was made

{chr(10).join(f"    {step}" for step in steps)}

the last with these settings:

| setting | value |
|---|---|
{_settings(config)}

`alphapruning.json` holds all of them, the record of the pruning, the versions of the libraries, and what happened.
"""
    return str(ModelCard(text))


def _steps(config: Flags, record: dict) -> list[str]:
    """The commands that made a checkpoint, in order, as far as they are recorded."""
    earlier = record.get("pruning")
    before = []
    if earlier:
        kind = type(config) if "training" in earlier else RunConfig  # fine-tuned before as well, or pruned
        before = _steps(kind.recorded(earlier["config"]), earlier)
    return [*before, _command(config, Path(config.save_model).name)]


def base_model(model: str) -> str | None:
    """The model's name on the hub, where it has one that can be told: given as --model, or that of a cached copy."""
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model].hub
    path = Path(model)
    if path.exists():
        cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{path.absolute()}/")
        return "/".join(cached.groups()) if cached else None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def _perplexity(measured: dict | None) -> str:
    if measured is None:
        return "Was not measured."
    dense = f"{measured['dense']:.4f}" if measured["dense"] else "not measured"
    name = Path(measured["dataset"]).name
    return (
        f"On `{name}`, {measured['windows']} windows of {measured['seqlen']} tokens (lower is better):\n\n"
        f"| dense | pruned |\n|---|---|\n| {dense} | {measured['pruned']:.4f} |"
    )


def _accuracies(zero_shot: dict | None) -> str:
    if not zero_shot:
        return ""

    def row(name: str, found: dict) -> str:
        return f"| {name} | {' | '.join('' if found[when] is None else f'{found[when]:.4f}' for when in stages)} |"

    metric, stages, rows = zero_shot["mean"]["metric"], zero_shot["stages"], []
    for name in zero_shot["mean"]["tasks"]:
        task = zero_shot["tasks"][name]
        rows.append(row(name, {when: task[when] and task[when].get(metric) for when in stages}))
    limited = f", the first {zero_shot['limit']} documents of each" if zero_shot["limit"] else ""
    table = [f"| task | {' | '.join(stages)} |", "|---|---|---|", *rows, row("mean", zero_shot["mean"])]
    head = f"\n## Zero-shot accuracy\n\n`{metric}` of {zero_shot['harness']}{limited}:\n"
    return "\n".join([head, *table, ""])


def _command(config: Flags, folder: str) -> str:
    """The command that makes the checkpoint again."""
    words = ["python", config.command]
    for item, value in _deciding(config):
        if isinstance(value, bool):
            words.append(flag_of(item) if value else f"--no-{item.name}")
        elif value != item.default:
            words += [flag_of(item), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join([*words, "--save_model", folder])


def _settings(config: Flags) -> str:
    """A row for every flag that decided the result."""
    rows = []
    for item, value in _deciding(config):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append(f"| `{flag_of(item)}` | {shown.replace('|', '/')} |")
    return "\n".join(rows)


def _deciding(config: Flags) -> list[tuple[Field, object]]:
    """The fields that decided the run's result, with their values; of switches only those that were turned."""
    unread = config.unread()
    items = itertools.chain.from_iterable(config.groups().values())
    values = [(item, getattr(config, item.name)) for item in items if item.name not in config.apart]
    return [
        (item, value)
        for item, value in values
        if item.name not in unread and value is not None and (value != item.default or not isinstance(value, bool))
    ]
