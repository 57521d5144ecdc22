"""The model card of a saved checkpoint: what the hub reads of it, and what people do."""

import shlex

import pytest
from huggingface_hub import ModelCard
from test_checkpoints import run
from tiny import tiny_model

from lib import RunConfig, cli
from lib.results.card import base_model, model_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records and cards of a run in memory and of one streamed."""
    here = tmp_path_factory.mktemp("card")
    tiny_model("llama").save_pretrained(here / "model")
    runs = [run(here, name, stream=name == "parts", sparsity_ratio=0.625) for name in ("whole", "parts")]
    return {folder.name: (record, ModelCard.load(folder / "README.md"), folder) for record, folder in runs}


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_it_holds_the_result(name, made):
    record, card, _ = made[name]
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"pruned", "sparsegpt"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # of a folder nobody knows its name on the hub
    assert f"| {record['perplexity']['dense']:.4f} | {record['perplexity']['pruned']:.4f} |" in card.text
    for block, share in enumerate(record["sparsity"]["blocks"]):
        assert f"| {block} | {share:.4f} |" in card.text
    assert "| `--sparsity_ratio` | 0.625 |" in card.text
    assert "| `--prune_method` | sparsegpt |" in card.text
    assert "--epsilon" not in card.text  # which uniform sparsities do not read
    assert "AutoModelForCausalLM.from_pretrained(" in card.text


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_its_command_makes_the_checkpoint_again(name, made):
    record, card, folder = made[name]
    (command,) = [line.strip() for line in card.text.splitlines() if line.startswith("    python main.py")]
    again = cli.parse(shlex.split(command)[2:])
    assert again.run_name == record["run"]
    assert again.save_model == folder.name


def test_switches_are_spelt_as_they_are_given(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = RunConfig(
        model=str(tmp_path / "model"), prune_method="wanda_ww", sparsity_type="4:8", eval_wikitext=False,
        ww_metric=("alpha_mid",), calib_data="wikitext2", save_model=str(tmp_path / 'a "good" one'),
    )  # fmt: skip
    record = {
        "model": {"revision": "abc", "prunable_parameters": 10, "coverage": 0.5}, "perplexity": None,
        "sparsity": {"achieved": 0.5, "blocks": [0.5]},
    }  # fmt: skip
    card = ModelCard(model_card(config, record))
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert "--no-eval_wikitext" in card.text
    assert "--WW_metric alpha_mid" in card.text
    assert "Was not measured." in card.text
    assert "(revision abc)" in card.text
    compile(card.text.partition("```python")[2].partition("```")[0], "the code of the card", "exec")


def test_the_base_model_is_one_on_the_hub(tmp_path):
    cached = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert base_model(str(cached)) == "meta-llama/Llama-2-7b-hf"
    assert base_model(str(tmp_path)) is None
    assert base_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_model("gpt2") == "gpt2"
    assert base_model(str(tmp_path / "gone.gguf")) is None
    assert base_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
