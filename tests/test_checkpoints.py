"""Every form of a checkpoint holds the same weights for all that reads it, and is saved as what it was."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_bad_input import make_texts, save_tokenizer
from tiny import pairs, tiny_model, tiny_tokens

import main
from lib import LanguageModel, RunConfig, RunError, find_source, perplexity, save_checkpoint
from lib.analysis import analyze
from lib.load import load_model, open_model
from lib.stopwatch import Stopwatch

BLOCK = 8  # rows and columns that share a scale
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def edit(folder: Path, change) -> None:
    """Have `change` alter the tensors of a folder's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def settings(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_bin(folder: Path, **options) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def in_two_bins(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def quantise(tensors: dict, plain: dict) -> None:
    """The blocks' matrices as float8 with a scale for every square of BLOCK; `plain` gets what they stand for."""
    plain |= tensors
    for name, weight in list(tensors.items()):
        inside = name.endswith("weight") and any(part.isdigit() for part in name.split("."))
        if inside and weight.dim() == 2 and len(weight) >= BLOCK:
            squares = weight.view(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
            scale = squares.abs().amax((1, 3), keepdim=True) / 448
            codes = (squares / scale).to(torch.float8_e4m3fn)
            tensors[name] = codes.view_as(weight)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0]
            plain[name] = (codes.float() * scale).view_as(weight)


def make(form: str, architecture: str, folder: Path) -> Path:
    """A checkpoint of that form in `folder`; returns the folder of an ordinary one with the same weights."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    tiny_model(architecture).to(dtype).save_pretrained(
        folder, max_shard_size="20KB" if form in ("shards", "two forms") else "1GB"
    )
    if form == "bin":
        as_bin(folder)
    elif form == "bin of old":
        as_bin(folder, _use_new_zipfile_serialization=False)
    elif form == "two bins":
        in_two_bins(folder)
    elif form == "fp8":
        plain: dict = {}
        edit(folder, lambda tensors: quantise(tensors, plain))
        shutil.copytree(folder, folder.with_name("plain"))
        save_file(plain, folder.with_name("plain") / "model.safetensors", {"format": "pt"})
        settings(folder, quantization_config=FP8)
        return folder.with_name("plain")
    elif form == "two forms":  # transformers reads the single file
        tiny_model(architecture, seed=1).save_pretrained(folder.with_name("single"))
        shutil.copy(folder.with_name("single") / "model.safetensors", folder)
        return folder.with_name("single")
    elif form == "own head":
        settings(folder, tie_word_embeddings=True)
    return folder


FORMS = (
    "float32", "float16", "bfloat16", "shards", "bin", "bin of old", "two bins", "fp8", "two forms", "own head",
)  # fmt: skip


def reference(folder: Path, tokens: torch.Tensor) -> float:
    """The perplexity by transformers' own loading, forward pass and loss."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())


# DBRX refuses a tied head.
CASES = [pair for pair in pairs(FORMS, at_least=3) if pair != ("dbrx", "own head")]


@pytest.mark.parametrize(("architecture", "form"), CASES)
def test_every_path_reads_what_transformers_reads(architecture, form, tmp_path):
    folder, tokens = tmp_path / "model", tiny_tokens(windows=2)
    expected = reference(make(form, architecture, folder), tokens)
    source = find_source(str(folder), str(tmp_path / "cache"))
    whole, streamed = load_model(source, "cpu"), open_model(source, "cpu")
    assert whole.digest == streamed.digest
    streamed.load_non_blocks()
    assert perplexity(whole, tokens) == pytest.approx(expected, rel=1e-5)
    assert perplexity(streamed, tokens) == pytest.approx(expected, rel=1e-5)
    assert (whole.parameters, whole.save_dtypes) == (streamed.parameters, streamed.save_dtypes)


# -- what cannot be read is refused before anything is, the same on every path


def refusals(folder: Path) -> set[str]:
    """What loading in memory, streaming and analysing say, without the path that all begin with."""
    source, said = find_source(str(folder)), set()
    config = RunConfig(model=str(folder), analyze_only=True, save=str(folder / "out"), device="cpu")
    paths = (
        lambda: load_model(source, "cpu"),
        lambda: open_model(source, "cpu").load_non_blocks(),
        lambda: analyze(config, Stopwatch(), []),
    )
    for path in paths:
        with pytest.raises(RunError) as caught:
            path()
        said.add(str(caught.value).removeprefix(f"--model {folder}: "))
    return said


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "of tomorrow"}, "of tomorrow"),
        ({"bits": 4}, "without a name"),
    ],
)
def test_a_quantisation_that_cannot_be_undone_is_refused(how, says, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    settings(tmp_path / "model", quantization_config=how)
    (said,) = refusals(tmp_path / "model")
    assert said.startswith("its weights are quantised (")
    assert says in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("pickled", [False, True])
def test_codes_without_an_explanation_are_refused(dtype, pickled, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].mul(20).to(dtype)}))
    if pickled:
        as_bin(tmp_path / "model")
    (said,) = refusals(tmp_path / "model")
    assert name in said
    assert "nothing in its config.json says" in said


def test_float8_without_its_scales_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: quantise(tensors, {}))
    edit(tmp_path / "model", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv"))
    settings(tmp_path / "model", quantization_config=FP8)
    (said,) = refusals(tmp_path / "model")
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_packed_weights_without_a_configuration_are_refused(tmp_path):
    """As GPTQ wrote them before it wrote into config.json."""
    tiny_model("llama").save_pretrained(tmp_path / "model")

    def pack(tensors):
        for name in [name for name in tensors if "proj" in name]:
            weight = tensors.pop(name)
            tensors[name.replace("weight", "qweight")] = torch.zeros(weight.shape[1] // 8, weight.shape[0]).int()

    edit(tmp_path / "model", pack)
    (said,) = refusals(tmp_path / "model")
    assert said.startswith("its weights are quantised (model.layers.0.")
    assert "qweight is I32" in said


def test_a_head_that_is_missing_is_refused_unless_it_is_tied(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    source = find_source(str(folder))
    for path in (lambda: load_model(source, "cpu"), lambda: open_model(source, "cpu").load_non_blocks()):
        with pytest.raises(RunError, match=r"lm_head\.weight is missing"):
            path()
    settings(folder, tie_word_embeddings=True)
    streamed = open_model(source, "cpu")
    streamed.load_non_blocks()
    for model in (load_model(source, "cpu").model, streamed.model):
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_embedding_is_the_head_where_only_that_is_there(tmp_path):
    tiny_model("llama_tied").save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    source, tokens = find_source(str(tmp_path / "model")), tiny_tokens(windows=2)
    streamed = open_model(source, "cpu")
    streamed.load_non_blocks()
    expected = perplexity(LanguageModel(tiny_model("llama_tied")), tokens)
    assert perplexity(load_model(source, "cpu"), tokens) == pytest.approx(expected, rel=1e-6)
    assert perplexity(streamed, tokens) == pytest.approx(expected, rel=1e-6)


class _Poison:
    def __reduce__(self):
        return os.system, ("touch poisoned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    as_bin(tmp_path / "model")
    tensors = {**torch.load(tmp_path / "model" / "pytorch_model.bin"), "x": _Poison()}
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (said,) = refusals(tmp_path / "model")
    assert "system" in said
    assert "was not loaded" in said
    assert not (tmp_path / "poisoned").exists()
    for advice in ("weights_only", "trust", "allowlist", "safe_globals"):
        assert advice not in said


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut short"])
def test_a_bin_that_is_none_is_refused(content, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    (said,) = refusals(tmp_path / "model")
    assert "pytorch_model.bin" in said
    assert "weights_only" not in said


def test_a_variant_and_an_index_of_missing_files_are_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "variant", variant="fp16")
    (said,) = refusals(tmp_path / "variant")
    assert "model.fp16.safetensors" in said
    tiny_model("llama").save_pretrained(tmp_path / "index", max_shard_size="20KB")
    gone = sorted((tmp_path / "index").glob("model-*"))[1]
    gone.unlink()
    (said,) = refusals(tmp_path / "index")
    assert gone.name in said


def test_scales_under_other_names_are_said_to_be_missing(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")

    def per_tensor(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            scale = tensors[name].abs().max() / 448
            tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    edit(tmp_path / "model", per_tensor)
    settings(tmp_path / "model", quantization_config=FP8)
    (said,) = refusals(tmp_path / "model")
    assert "its files lack the scales that go with the method in its config.json (fp8)" in said


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (lambda tensors: list(tensors.values()), "does not hold tensors by name"),
        (lambda tensors: {**tensors, 7: torch.zeros(2)}, "does not hold tensors by name"),
        (lambda tensors: {**tensors, "x": torch.eye(3).to_sparse()}, "x is stored as a sparse tensor"),
        (lambda tensors: {**tensors, "x": torch.empty(3, device="meta")}, "x is without values"),
    ],
)
def test_a_pickle_of_anything_but_tensors_by_name_is_refused(held, says, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    as_bin(tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model.bin"
    torch.save(held(torch.load(file)), file)
    (said,) = refusals(tmp_path / "model")
    assert f"pytorch_model.bin cannot be read: {says}" in said.replace(": it ", ": ")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (said,) = refusals(tmp_path / "model")
    assert f"{name} cannot be read: it is a pointer of Git LFS" in said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"metadata": None}, "has no metadata, without which transformers does not read it"),
        ({"weight_map": None}, "is no index of weights"),
        ({"weight_map": {"x": "part.bin"}}, "names part.bin, which is no .safetensors file"),
    ],
)
def test_an_index_that_transformers_cannot_read_is_refused(changed, says, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "part.bin").write_bytes(b"")
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    (said,) = refusals(tmp_path / "model")
    assert f"model.safetensors.index.json {says}" in said


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_of_another_shape_is_named(name, tmp_path):
    tiny_model("llama_tied").save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.rand(100, 32)}))
    (said,) = refusals(tmp_path / "model")
    assert f"{name} is [100, 32] in its files and [" in said


def test_a_configuration_that_makes_no_model_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    settings(tmp_path / "model", text_config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    (said,) = refusals(tmp_path / "model")
    assert said.startswith("its configuration describes no model that can be built: ")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_to_be_merged_first(weights, alone, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "model" / weights).write_bytes(b"")
    if alone:
        (tmp_path / "model" / "config.json").unlink()
    for flags in ({"prune_method": "wanda", "sparsity_ratio": 0.5}, {"analyze_only": True}):
        with pytest.raises(RunError, match=r"merge_and_unload\(\)"):
            RunConfig(model=str(tmp_path / "model"), calib_data="pydoc", eval_data="pydoc", **flags)


# -- saving


def run(tmp_path: Path, name: str, **flags) -> tuple[dict, Path]:
    """One whole run on the checkpoint tmp_path/model: its record, and the folder of what it saved."""
    if not (tmp_path / "words.txt").exists():
        make_texts(tmp_path)
        save_tokenizer(tmp_path / "model")
    words, saved = str(tmp_path / "words.txt"), tmp_path / name
    config = RunConfig(**{
        "model": str(tmp_path / "model"), "prune_method": "sparsegpt", "sparsity_ratio": 0.5, "calib_data": words,
        "eval_data": words, "seqlen": 16, "nsamples": 4, "eval_windows": 4, "device": "cpu", "eval_dense": True,
        "save": str(tmp_path / "results"), "cache_dir": str(tmp_path / "cache"), "save_model": str(saved), **flags,
    })  # fmt: skip
    return main.run(config), saved


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def share_of_zeros(folder: Path) -> float:
    matrices = LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).matrices
    return sum(int((m.weight == 0).sum()) for m in matrices) / sum(m.size for m in matrices)


@pytest.mark.parametrize(
    ("form", "save_dtype"),
    [
        *((form, "auto") for form in ("float32", "float16", "bfloat16", "two bins", "fp8", "own head")),
        ("float16", "bfloat16"),
        ("own head", "bfloat16"),
    ],
)
def test_both_paths_save_the_same_bytes_in_the_right_dtype(form, save_dtype, tmp_path):
    tokens = tiny_tokens(windows=2) % 64
    make(form, "llama", tmp_path / "model")
    (memory, whole), (streamed, parts) = (
        run(tmp_path, name, save_dtype=save_dtype, stream=name == "parts") for name in ("whole", "parts")
    )
    saved, other = tensors_of(whole), tensors_of(parts)
    assert saved.keys() == other.keys()
    assert all(saved[n].dtype == other[n].dtype and torch.equal(saved[n], other[n]) for n in saved)
    own = form if form in ("float16", "bfloat16") else "float32"
    dtype = own if save_dtype == "auto" else save_dtype
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
    for folder, record in ((whole, memory), (parts, streamed)):
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == dtype
        assert "quantization_config" not in config
        # What the run says of the pruned model holds for the checkpoint.
        assert share_of_zeros(folder) == pytest.approx(record["sparsity"]["achieved"], abs=1e-9)
        loaded = load_model(find_source(str(folder)), "cpu")
        assert perplexity(loaded, tokens) == pytest.approx(reference(folder, tokens), rel=1e-5)
    assert memory["perplexity"]["pruned"] == pytest.approx(streamed["perplexity"]["pruned"], rel=1e-6)
    if form == "own head" and save_dtype == "auto":
        original = load_file(tmp_path / "model" / "model.safetensors")
        assert torch.equal(saved["lm_head.weight"], original["lm_head.weight"])


def test_tensors_of_another_dtype_keep_it(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    name = "model.layers.1.input_layernorm.weight"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.rand(32)}))
    for folder in (run(tmp_path, "whole")[1], run(tmp_path, "parts", stream=True)[1]):
        saved = tensors_of(folder)
        assert torch.equal(saved[name], load_file(tmp_path / "model" / "model.safetensors")[name])
        assert saved["lm_head.weight"].dtype == torch.bfloat16
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("stream", [False, True])
def test_values_too_small_or_too_large_for_the_dtype(stream, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    small, large = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors[small][:4].fill_(1e-9))
    record, folder = run(tmp_path, "pruned", save_dtype="float16", stream=stream, prune_method="magnitude")
    # The 24 rows of 32 hold 4 rows of tiny values; magnitude has removed these already, and others beside them.
    assert record["sparsity"]["achieved"] == pytest.approx(share_of_zeros(folder), abs=1e-9)
    edit(tmp_path / "model", lambda tensors: tensors[small].fill_(1e-9))
    record, folder = run(tmp_path, "tiny", save_dtype="float16", stream=stream, prune_method="magnitude")
    assert share_of_zeros(folder) == pytest.approx(record["sparsity"]["achieved"], abs=1e-9)
    assert record["layers"][5]["name"] + ".weight" == small
    assert record["layers"][5]["sparsity"] == 1
    assert any(small in event["message"] and "too small" in event["message"] for event in record["events"])
    edit(tmp_path / "model", lambda tensors: tensors[large].fill_(1e5))
    with pytest.raises(RunError, match=rf"--save_dtype.*{large}.*float16"):
        run(tmp_path, "large", save_dtype="float16", stream=stream, prune_method="magnitude", sparsity_ratio=0.25)


@pytest.mark.parametrize(
    ("content", "stream"),
    [
        ('{"max_new_tokens": -5, "num_return_sequences": 4}', False),  # read by none
        ('{"num_return_sequences": 4}', False),  # read, and saved by none
        ('{"num_return_sequences": 4}', True),
        ('{"temperature": 0.9, "do_sample": false}', True),
        ('{"no": json', False),
        ('["a list"]', True),
        ('{"max_new_tokens": "many"}', False),
    ],
)
def test_no_generation_configuration_ends_a_run(stream, content, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    record, folder = run(
        tmp_path, "pruned", stream=stream, prune_method="magnitude", eval_wikitext=False, eval_dense=False
    )
    transformers.GenerationConfig.from_pretrained(folder).validate(strict=True)
    (said,) = [event["message"] for event in record["events"] if "generation" in event["message"]]
    assert "invalid: )" not in said  # the reason, and not its heading alone
    assert "\n" not in said


def test_a_good_generation_configuration_is_saved(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": true, "top_k": 9}')
    for stream in (False, True):
        record, folder = run(tmp_path, f"pruned{stream}", stream=stream, prune_method="magnitude")
        saved = transformers.GenerationConfig.from_pretrained(folder)
        assert (saved.max_new_tokens, saved.do_sample, saved.top_k) == (7, True, 9)
        assert not [event for event in record["events"] if "generation" in event["message"]]


@pytest.mark.parametrize(("umask", "stream"), [(0o022, False), (0o027, False), (0o002, True)])
def test_files_are_for_those_that_the_umask_says(umask, stream, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    before = os.umask(umask)
    try:
        flags = {"prune_method": "magnitude", "eval_wikitext": False, "eval_dense": False}
        _, folder = run(tmp_path, "pruned", stream=stream, **flags)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {oct(0o666 & ~umask)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_link_to_an_older_checkpoint_is_followed(stream, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    flags = {"prune_method": "magnitude", "eval_wikitext": False, "eval_dense": False, "stream": stream}
    _, folder = run(tmp_path, "pruned", **flags)
    (tmp_path / "link").symlink_to(folder)
    run(tmp_path, "link", **flags, sparsity_ratio=0.25)
    assert (tmp_path / "link").is_symlink()
    assert share_of_zeros(folder) == pytest.approx(0.25)


def test_saving_a_model_at_hand(tmp_path):
    """Of a model that came from nowhere, the dtype is its own."""
    save_checkpoint(LanguageModel(tiny_model("llama").to(torch.bfloat16)), tmp_path / "saved")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "saved").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_that_no_file_holds_are_those_of_transformers(dtype, tmp_path):
    """GPT-J's table of angles is made in float32 whatever the model's dtype."""
    settings = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 8}
    hf = transformers.AutoModelForCausalLM.from_config(transformers.GPTJConfig(**settings, bos_token_id=1))
    hf.save_pretrained(tmp_path)
    own = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_buffers())
    source = find_source(str(tmp_path))
    for model in (load_model(source, "cpu", dtype), open_model(source, "cpu", dtype)):
        found = dict(model.model.named_buffers())
        assert found.keys() == own.keys() != set()
        assert all(torch.equal(found[name], value) for name, value in own.items())


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("ramp", torch.arange(7.0) / 3, persistent=False)
"""


def test_buffers_of_code_that_comes_with_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    hf = tiny_model("llama")
    hf.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {
        "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(OWN_CODE)
    source = find_source(str(tmp_path / "model"), trust_remote_code=True)
    for model in (load_model(source, "cpu"), open_model(source, "cpu")):
        assert torch.equal(model.model.ramp, torch.arange(7.0) / 3)
