"""Recipes for llm-compressor: what they say, and with the package itself what comes of them."""

import importlib.util
import json
import runpy

import pytest
import torch
import transformers
import yaml
from shared import ROOT
from test_bad_input import save_tokenizer
from tiny import tiny_model

from lib import LanguageModel, RunError

needs_llmcompressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None,
    reason="llmcompressor is not installed (pip install llmcompressor)",
)
Q, K, DOWN = (f"model.layers.0.{kind}" for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
TABLE = f"name,block,target_sparsity\n{Q},0,0.25\n{K},0,0\n{DOWN},0,0.625\nmodel.layers.1.mlp.down_proj,1,0.25\n"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "script/to_llmcompressor.py"))


@pytest.fixture
def folder(tmp_path):
    """A run's folder, by its settings."""

    def make(**settings):
        model = {"model": str(tmp_path / "gone"), "cache_dir": str(tmp_path)}
        (tmp_path / "layers.csv").write_text(TABLE)
        (tmp_path / "run.json").write_text(json.dumps({"config": {**model, **settings}}))
        return tmp_path

    return make


def modifiers(recipe: dict) -> list[tuple[str, dict]]:
    return [item for group in recipe["pruning_stage"].values() for item in group.items()]


def test_a_modifier_for_each_sparsity(script, folder):
    recipe = script["recipe"](str(folder(prune_method="sparsegpt_ww", sparsity_type="unstructured")))
    assert modifiers(recipe) == [
        ("SparseGPTModifier", {"sparsity": 0.25, "targets": [Q, "model.layers.1.mlp.down_proj"]}),
        ("SparseGPTModifier", {"sparsity": 0.625, "targets": [DOWN]}),
    ]


def test_n_of_m(script, folder):
    recipe = script["recipe"](str(folder(prune_method="wanda_ww", sparsity_type="4:8")))
    assert [(name, what["mask_structure"]) for name, what in modifiers(recipe)] == [
        ("WandaPruningModifier", "2:8"), ("WandaPruningModifier", "5:8"),
    ]  # fmt: skip
    with pytest.raises(RunError, match=r"0.625, which is no multiple of 1/4"):
        script["recipe"](str(folder(prune_method="wanda_ww", sparsity_type="2:4")))


@pytest.mark.parametrize(("architecture", "matrix"), [("mixtral", "mlp.experts.gate_up_proj.0"), ("gpt2", "c_attn")])
def test_what_it_would_pass_over_is_refused(architecture, matrix, script, folder, tmp_path):
    """Stacks of experts, and matrices of another class; of a Llama there are none."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    tiny_model(architecture).save_pretrained(tmp_path / "other")
    run = folder(prune_method="wanda", model=str(tmp_path / "llama"))
    assert len(modifiers(script["recipe"](str(run)))) == 2
    folder(prune_method="wanda", model=str(tmp_path / "other"))
    names = [matrix.name for matrix in LanguageModel(tiny_model(architecture)).matrices]
    (run / "layers.csv").write_text("".join(f"{name},0.5\n" for name in names))
    with pytest.raises(RunError, match=rf"run.json: llm-compressor would pass over \d+ matrices, such as .*{matrix}"):
        script["recipe"](str(run))


def test_a_model_that_is_gone_is_said(script, folder, capsys):
    script["recipe"](str(folder(prune_method="wanda")))
    assert "run.json: not compared with its model: --model " in capsys.readouterr().err


def test_a_run_of_another_pruner(script, folder, tmp_path, capsys):
    assert script["main"]([str(folder(prune_method="alps"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("to_llmcompressor.py: error: --modifier: is missing; ")
    assert line.endswith("run.json is of alps, which llm-compressor has not: give one of sparsegpt, wanda")
    assert script["main"]([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"to_llmcompressor.py: error: {tmp_path / 'none'}: ")


def test_a_table_alone(script, tmp_path, capsys):
    (tmp_path / "s.csv").write_text(TABLE)
    assert script["main"]([str(tmp_path / "s.csv"), "--modifier", "wanda"]) == 0
    assert modifiers(yaml.safe_load(capsys.readouterr().out))[1] == (
        "WandaPruningModifier", {"sparsity": 0.625, "targets": [DOWN]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (TABLE, [], "s.csv is of no run: give one of sparsegpt, wanda"),
        (TABLE, ["--modifier", "alps"], "--modifier: 'alps' is unknown"),
        (TABLE, ["--modifier", "wanda", "--sparsity_type", "2of4"], "--sparsity_type: '2of4' is neither"),
        ("*,0.5\n", ["--modifier", "wanda"], "'*' is no matrix's name"),
        ("0,0.5\n", ["--modifier", "wanda"], "'0' is no matrix's name"),
        ("a,0\n", ["--modifier", "wanda"], "has no sparsity above 0"),
        ("a,2\n", ["--modifier", "wanda"], "'a' has 2"),
        (TABLE, ["--modifer", "wanda"], "--modifer"),
    ],
)
def test_errors_are_one_line(text, flags, message, script, tmp_path, capsys):
    (tmp_path / "s.csv").write_text(text)
    assert script["main"]([str(tmp_path / "s.csv"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("to_llmcompressor.py: error: ")
    assert message in line


@needs_llmcompressor
@pytest.mark.parametrize(("modifier", "sparsity_type"), [("wanda", "unstructured"), ("sparsegpt", "4:8")])
def test_the_package_prunes_to_it(modifier, sparsity_type, script, tmp_path):
    """To a weight a row, which is how it rounds, and no other matrix."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-2]
    asked = {name: (index % 8) / 8 for index, name in enumerate(names)}
    (tmp_path / "s.csv").write_text("".join(f"{name},{share}\n" for name, share in asked.items()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(script["recipe"](str(tmp_path / "s.csv"), modifier, sparsity_type)))
    tokens = torch.randint(3, 96, (16, 1, 24), generator=torch.Generator().manual_seed(0))
    data = DataLoader([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in tokens], batch_size=None)
    oneshot(model=model, recipe=str(recipe), dataset=data, num_calibration_samples=16, pipeline="sequential")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            share = float((module.weight == 0).float().mean())
            assert share == pytest.approx(asked.get(name, 0.0), abs=1 / module.in_features), name
