"""Matrices out of safetensors files, by name and one at a time, are those of the loaded model."""

import json
import shutil

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tiny import ARCHITECTURES, tiny_model
from transformers import conversion_mapping, core_model_loading

from lib import LanguageModel, RunError, find_source, layer_quality
from lib.load import open_model
from lib.shards import ShardedModel, Shards


@pytest.fixture
def folder(tmp_path):
    def save(architecture: str, **options):
        tiny_model(architecture).save_pretrained(tmp_path / "model", **options)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_is_the_loaded_models(architecture, folder):
    path = folder(architecture, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    loaded = LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(path))
    opened = open_model(find_source(str(path)), "cpu")
    assert isinstance(opened, ShardedModel)
    assert [m.name for m in opened.matrices] == [m.name for m in loaded.matrices]
    for group, plain in zip(opened.groups(), loaded.groups(), strict=True):
        assert all(m.weight.is_meta for m in group)
        with opened.resident(group):
            for a, b in zip(group, plain, strict=True):
                assert torch.equal(a.weight, b.weight), a.name
        assert all(m.weight.is_meta for m in group)
    assert opened.digest == loaded.digest
    assert (opened.parameters, opened.coverage) == (loaded.parameters, loaded.coverage)


def test_metrics_of_the_files_are_those_of_the_model(folder):
    path = folder("mixtral")
    opened = layer_quality(open_model(find_source(str(path)), "cpu"), "alpha_mid", "stable_rank")
    loaded = layer_quality(LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(path)), *opened)
    assert opened == loaded


def test_bfloat16_files_have_the_values_of_float32(folder, tmp_path):
    path = folder("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    whole = LanguageModel(model.float())
    assert open_model(find_source(str(tmp_path / "half")), "cpu").digest == whole.digest


def test_a_base_models_checkpoint_lacks_the_prefix(folder, tmp_path):
    tiny_model("llama").model.save_pretrained(tmp_path / "base")
    names = list(json.loads((tmp_path / "base" / "config.json").read_text())["architectures"])
    assert names == ["LlamaModel"]
    assert open_model(find_source(str(tmp_path / "base")), "cpu").digest == LanguageModel(tiny_model("llama")).digest


def test_a_missing_matrix_is_named(folder):
    path = folder("llama", max_shard_size="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    gone = index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    (path / gone).unlink()
    with pytest.raises(RunError, match=gone):
        open_model(find_source(str(path)), "cpu")
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"layers\.\d\.\S+ is missing"):
        layer_quality(open_model(find_source(str(path)), "cpu"), "alpha_mid")


def test_a_truncated_file_is_named(folder):
    path = folder("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        open_model(find_source(str(path.parent)), "cpu")


def test_another_shape_is_an_error(folder):
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(RunError, match=r"down_proj\.weight is \[32, 48\] in its files and \[32, 40\] in the model"):
        layer_quality(open_model(find_source(str(path)), "cpu"), "alpha_mid")


def test_bin_files_are_read_in_parts_too(folder, tmp_path):
    path = folder("llama")
    shutil.copytree(path, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_model("llama").state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    source = find_source(str(tmp_path / "bin"), str(tmp_path / "cache"))
    opened = open_model(source, "cpu")
    assert opened.digest == LanguageModel(tiny_model("llama")).digest
    assert not (tmp_path / "cache").exists()


def test_one_tensor_that_several_parameters_are_made_of(tmp_path, monkeypatch):
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    split = [core_model_loading.WeightConverter(["mlp.both.weight"], parts, [core_model_loading.Chunk(dim=0)])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: split)
    hf = tiny_model("llama")
    state = hf.state_dict()
    for layer in range(3):
        gate, up = (state.pop(f"model.layers.{layer}.{part}") for part in parts)
        state[f"model.layers.{layer}.mlp.both.weight"] = torch.cat([gate, up])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with init_empty_weights():
        empty = type(hf)(hf.config)
    shards = Shards(empty, [tmp_path / "model.safetensors"], "tiny")
    shards.check(whole=True)
    one, other = (f"model.layers.1.{part}" for part in parts)
    for name, beside in ((one, other), (other, one)):
        shards.read([name], torch.device("cpu"))
        assert torch.equal(empty.get_parameter(name), hf.get_parameter(name))
        assert empty.get_parameter(beside).is_meta
        shards.drop([name])
    shards.read([one, other], torch.device("cpu"))
    assert all(torch.equal(empty.get_parameter(name), hf.get_parameter(name)) for name in (one, other))
