"""What is fetched from a hub, how often, and what is said when it fails, against tests/hub.py."""

import gzip
import hashlib
import io
import json
import logging
import os
import re
import shlex
import subprocess
import threading
import time

import pyarrow
import pytest
import sentencepiece
import torch
import transformers
from hub import Hub
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from pyarrow import parquet
from safetensors.torch import save
from shared import ROOT

import main
from lib import (
    RunError,
    calibration_windows,
    cli,
    evaluation_windows,
    find_source,
    load_model,
    load_tokenizer,
    open_model,
)
from lib import hub as doors
from lib.load import weight_files

LLAMA = "pinkmanlove/llama-7b-hf"
WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "r", "sh", "t")]
BIN, INDEX = "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A sentencepiece model of the kind that LLaMA's is."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(40)]), model_writer=made,
        vocab_size=400, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="session")
def llama(tokenizer_model) -> dict[str, bytes | str]:
    """The files of LLaMA-7B as they lie on the hub, but small: two .bin shards, a sentencepiece tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    state = transformers.LlamaForCausalLM(config).half().state_dict()
    shards = [dict(list(state.items())[part::2]) for part in (0, 1)]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "config.json": config.to_json_string(use_diff=False),
        "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        "tokenizer.model": tokenizer_model,
        "tokenizer_config.json": json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special}),
        "special_tokens_map.json": json.dumps(special),
        "README.md": "# LLaMA-7B",
        ".gitattributes": "*.bin filter=lfs",
        INDEX: json.dumps(
            {"metadata": {}, "weight_map": {name: BIN.format(i + 1) for i in (0, 1) for name in shards[i]}}
        ),
        **{BIN.format(i + 1): _bytes(shards[i]) for i in (0, 1)},
    }


def _bytes(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def without_weights(files: dict) -> dict:
    return {name: contents for name, contents in files.items() if "pytorch_model" not in name}


@pytest.fixture(scope="session")
def in_safetensors(llama) -> dict[str, bytes | str]:
    state = {k: v for part in (1, 2) for k, v in torch.load(io.BytesIO(llama[BIN.format(part)])).items()}
    return {**without_weights(llama), "model.safetensors": save(state, {"format": "pt"})}


def table(column: str, rows: list[str]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: rows}), file)
    return file.getvalue()


def shard(documents: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents).encode())


def text_of(words: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(words))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this test's own, impatience, and nobody's token."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doors, "PATIENCE", 1.5)
    monkeypatch.setattr(doors, "ANSWER", 0.8)
    monkeypatch.setattr(doors, "PAUSE", 0.1)
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield running


@pytest.fixture
def said(caplog):
    """The lines of the log, as they come."""
    logger = logging.getLogger("lib")
    propagated, level = logger.propagate, logger.level
    logger.propagate = True
    caplog.set_level(logging.INFO, logger="lib")
    yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("lib")]
    logger.propagate = propagated
    logger.setLevel(level)


def texts(hub: Hub) -> None:
    """The data sets as they lie on the hub, of which no list could be made here (c4 has 10^5 files)."""
    rows = [text_of(300, start) for start in range(8)]
    hub.add(
        "Salesforce/wikitext",
        {f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet": table("text", rows) for part in ("train", "test")},
        kind="datasets",
    )
    hub.add(
        "allenai/c4",
        {
            "en/c4-train.00000-of-01024.json.gz": shard(rows),
            "en/c4-validation.00000-of-00008.json.gz": shard([f"{i} {text_of(40, i)}" for i in range(1200)]),
        },
        kind="datasets",
    )
    hub.add("ptb-text-only/ptb_text_only", {"ptb_text_only.py": "raise SystemExit('a script')"}, kind="datasets")
    hub.add(
        "ptb-text-only/ptb_text_only",
        {f"penn_treebank/{part}/0000.parquet": table("sentence", rows) for part in ("train", "test")},
        kind="datasets", revision="refs/convert/parquet",
    )  # fmt: skip


# the commands


SMALL = ("--nsamples", "2", "--seqlen", "64", "--eval_windows", "2", "--device", "cpu")


def test_the_script_runs_as_written_in_an_empty_home_and_then_without_the_hub(hub, llama, tmp_path, monkeypatch):
    hub.add(LLAMA, llama)
    texts(hub)
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    options = [*SMALL, "--cache_dir", str(cache), "--save", str(tmp_path / "out")]
    done = subprocess.run(
        ["bash", ROOT / "script/llama_prune.sh", *options], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity, wikitext2" in done.stdout
    assert list(home.iterdir()) == []  # models and data lie in --cache_dir, and nowhere else
    assert len([p for p in cache.rglob("*.bin") if p.is_symlink()]) == 2
    assert f"{LLAMA}: fetching {BIN.format(1)}" in done.stderr

    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cli, "set_up_logging", lambda quiet: None)
    words = ["--model", LLAMA, "--prune_method", "wanda_ww", "--sparsity_ratio", "0.7", "--epsilon", "0.2", *options]
    record = main.run(cli.parse(words))
    assert record["model"]["revision"] == find_source(LLAMA, str(cache)).snapshot.commit
    assert f"{record['perplexity']['pruned']:.3f}" in done.stdout
    assert len(hub.requests) == asked


def test_the_commands_of_the_readme_run_as_written(hub, llama, tmp_path):
    hub.add(LLAMA, llama)
    texts(hub)
    readme = (ROOT / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(rf"^    python main\.py (--model {LLAMA} .*)$", readme, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        options = [*SMALL, "--cache_dir", str(tmp_path / "cache"), "--save", str(tmp_path / "out")]
        record = main.run(cli.parse([*shlex.split(command), *options]))
        assert record["perplexity"]["pruned"] > 1
    assert len(hub.asked(BIN.format(1), "GET")) == 1
    assert len(hub.asked("c4-train", "GET")) == 1
    # Nothing is asked for but these: no conversion to safetensors, no list of discussions.
    paths = {f"/api/models/{LLAMA}", *hub.asked("/resolve/"), *hub.asked("@")}
    assert set(hub.asked()) == paths


# what is fetched


def test_safetensors_are_fetched_and_not_the_bin_beside_them(hub, llama, in_safetensors, tmp_path):
    hub.add("both/forms", {**llama, **in_safetensors, "model.gguf": b"x", "original/consolidated.00.pth": b"x"})
    source = find_source("both/forms", str(tmp_path))
    assert not hub.asked("safetensors")
    assert [path.name for path in weight_files(source)] == ["model.safetensors"]
    load_model(source, "cpu", "float32", load_tokenizer(source))
    assert not hub.asked("pytorch_model")
    assert not hub.asked("gguf")
    assert not hub.asked("original")


def test_a_model_of_bin_files_is_read_in_parts_once_all_of_them_are_there(hub, llama, tmp_path):
    hub.add(LLAMA, llama)
    source = find_source(LLAMA, str(tmp_path))
    hub.fail(BIN.format(2), 500)
    with pytest.raises(RunError, match="500"):
        open_model(source, "cpu")
    hub.failures.clear()
    assert open_model(source, "cpu").streamed


def test_code_comes_only_where_it_is_trusted(hub, llama, tmp_path):
    references = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads(llama["config.json"]) | {"model_type": "own", "auto_map": references}
    code = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    hub.add("own/code", {**llama, "config.json": json.dumps(config), "own.py": code})
    with pytest.raises(RunError, match="--trust_remote_code"):
        main.load_config(find_source("own/code", str(tmp_path)))
    assert not hub.asked("own.py")
    assert main.load_config(find_source("own/code", str(tmp_path), True)).model_type == "own"
    assert list((tmp_path / "modules").rglob("own.py"))  # and none in ~/.cache
    # A model may name code that lies in another repository.
    config["auto_map"] = {name: f"own/code--{reference}" for name, reference in references.items()}
    hub.add("tuned/model", {**llama, "config.json": json.dumps(config)})
    source = find_source("tuned/model", str(tmp_path / "other"), True)
    asked = len(hub.requests)
    assert main.load_config(source).model_type == "own"
    assert len(hub.requests) == asked


def test_the_token_reaches_the_hub_and_no_other_host(hub, in_safetensors, tmp_path, monkeypatch):
    hub.add("closed/model", in_safetensors, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    weight_files(find_source("closed/model", str(tmp_path)))
    assert {r.token for r in hub.requests if r.server == "hub"} == {"hf_good"}
    assert {r.token for r in hub.requests if r.server == "cdn"} == {""}


def test_a_later_run_takes_what_is_new_and_keeps_what_is_not(hub, in_safetensors, tmp_path):
    hub.add("some/model", in_safetensors)
    find_source("some/model", str(tmp_path))
    before = len(hub.requests)
    source = find_source("some/model", str(tmp_path))
    assert [r.path for r in hub.requests[before:] if r.method == "GET"] == ["/api/models/some/model"]
    assert source.snapshot.commit == source.snapshot.folder.name


@pytest.mark.parametrize("former", ["small", "former/name"])
def test_a_model_is_found_under_its_former_name(former, hub, in_safetensors, tmp_path):
    hub.add("some/model", in_safetensors)
    hub.moved[former] = "some/model"
    source = find_source(former, str(tmp_path))
    assert load_model(source, "cpu", "float32", load_tokenizer(source)).name == former


# texts


def test_c4_is_the_published_protocol(hub, tokenizer_model, tmp_path):
    texts(hub)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    cache = str(tmp_path / "cache")
    windows = evaluation_windows("c4", tokenizer, seqlen=16, cache_dir=cache)
    documents = [f"{i} {text_of(40, i)}" for i in range(1100)]
    assert torch.equal(
        windows, tokenizer(" ".join(documents), return_tensors="pt").input_ids[0][: 256 * 16].view(256, 16)
    )
    # With long windows all 1100 documents do not suffice for 256, and the 1101st is not taken.
    tokens = tokenizer(" ".join(documents), return_tensors="pt").input_ids[0]
    assert len(evaluation_windows("c4", tokenizer, seqlen=512, cache_dir=cache)) == len(tokens) // 512 < 256
    assert calibration_windows("c4", tokenizer, nsamples=3, seqlen=32, seed=0, cache_dir=cache).shape == (3, 32)
    assert not hub.asked("/api/")


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_a_text_that_was_fetched_is_read_without_asking(name, hub, tokenizer_model, tmp_path):
    texts(hub)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    cache = str(tmp_path / "cache")
    first = evaluation_windows(name, tokenizer, seqlen=16, limit=4, cache_dir=cache)
    asked = len(hub.requests)
    assert torch.equal(evaluation_windows(name, tokenizer, seqlen=16, limit=4, cache_dir=cache), first)
    assert len(hub.requests) == asked


# failures


def failing(name, arrange, *says, token=""):
    """What `arrange` makes of the hub ends in a line with every one of `says`."""
    return pytest.param(arrange, says, token, id=name.replace(" ", "-"))


def gated(hub, llama):
    hub.add("some/model", llama, gated=True)


def private(hub, llama):
    hub.add("some/model", llama, private=True)


def mistyped(hub, llama):
    hub.add("same/model", llama)


def fails(how, path="some/model", **headers):
    def arrange(hub, llama):
        hub.add("some/model", llama)
        hub.fail(path, how, **headers)

    return arrange


FAILURES = [
    failing("gated", gated, "gated", "401", "HF_TOKEN", "accept its terms at {hub}/some/model"),
    failing("gated for this account", gated, "gated", "403", "not in the authorized list", "ask", token="hf_other"),
    failing("private", private, "check the name", "HF_TOKEN"),
    failing("private for this account", private, "no model of this name", "404", token="hf_other"),
    failing("mistyped", mistyped, "no model of this name", "401", "check the name"),
    failing("mistyped with a token", mistyped, "no model of this name", "404", token="hf_good"),
    failing("bad token", fails(401), "refuses the token", token="expired"),
    failing("too often", fails(429), "429 Too Many Requests", "wait some minutes", "HF_TOKEN"),
    failing("too often for long", fails(429, **{"Retry-After": "250"}), "429", "wait 250 s"),
    failing("server error", fails(500), "500 Internal Server Error", "try again later"),
    failing("server error on a file", fails(503, "config.json"), "503 Service", "config.json", "try again later"),
    failing("cut", fails("cut"), "cut the connection", "Server disconnected", "try again"),
    failing("cut on a file", fails("cut", "tokenizer.model"), "cut the connection", "try again"),
    failing("hanging", fails("hang"), "does not answer", "timed out", "try again later"),
    failing("hanging on a file", fails("hang", "@tokenizer.model"), "does not answer", "localhost", "again later"),
    failing("stalling", fails("stall", "tokenizer.model"), "does not answer", "stalled", "again later"),
    failing("login page", fails("page"), "does not answer as the hub does", "login page"),
    failing("login page for files", fails("page", "config.json"), "does not answer as the hub does"),
    failing("teapot", fails(418, "tokenizer_config.json"), "418", "tokenizer_config.json"),
]


@pytest.mark.parametrize(("arrange", "says", "token"), FAILURES)
def test_what_fails_says_what_happened_and_what_to_do_in_one_line(
    arrange, says, token, hub, llama, tmp_path, monkeypatch
):
    arrange(hub, llama)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    began = time.monotonic()
    with pytest.raises(RunError) as raised:
        find_source("some/model", str(tmp_path))
    assert time.monotonic() - began < 3 * doors.PATIENCE
    line = str(raised.value)
    assert line.startswith("--model some/model: ")
    assert "\n" not in line
    for part in says:
        assert part.format(hub=hub.url) in line
    assert "offline" not in line
    assert not token or token not in line


@pytest.mark.parametrize("how", [500, "cut"])
def test_an_index_that_fails_is_no_model_without_safetensors(how, hub, llama, in_safetensors, tmp_path):
    index = json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    files = {**without_weights(llama), "model.safetensors.index.json": index}
    hub.add("some/model", {**llama, **files, "model-00001-of-00001.safetensors": in_safetensors["model.safetensors"]})
    hub.fail("model.safetensors.index.json", how)
    source = find_source("some/model", str(tmp_path))
    with pytest.raises(RunError, match=f"--model some/model: .*{'500' if how == 500 else 'cut'}"):
        open_model(source, "cpu")
    assert not hub.asked("pytorch_model")


def test_a_cut_is_mended_and_said(hub, in_safetensors, tmp_path, said, monkeypatch):
    hub.add("some/model", in_safetensors)
    hub.fail("/api/models/some/model", "cut", times=1)
    hub.fail("tokenizer_config.json", 503, times=1)
    hub.fail("model.safetensors", "half", times=2)
    monkeypatch.setattr(doors, "PATIENCE", 5)  # huggingface_hub waits of its own accord
    (file,) = weight_files(find_source("some/model", str(tmp_path)))
    assert file.read_bytes() == in_safetensors["model.safetensors"]
    assert [line for line in said() if "cut the connection" in line and "trying again" in line]
    assert [line for line in said() if "503" in line and "trying again" in line]
    assert [line for line in said() if "broke off" in line]
    assert [line for line in said() if "fetching model.safetensors (" in line]


def test_a_file_that_another_process_fetches_is_waited_for_with_a_line(
    hub, in_safetensors, tmp_path, said, monkeypatch
):
    hub.add("some/model", in_safetensors)
    monkeypatch.setattr(constants, "FILELOCK_LOG_EVERY_SECONDS", 0.1)
    source = find_source("some/model", str(tmp_path))
    etag = hashlib.sha256(in_safetensors["model.safetensors"]).hexdigest()
    lock = WeakFileLock(tmp_path / ".locks" / "models--some--model" / f"{etag}.lock")
    lock.__enter__()
    threading.Timer(0.5, lock.__exit__, [None] * 3).start()
    assert weight_files(source)
    assert [line for line in said() if "another process is fetching model.safetensors" in line]


def test_a_download_that_broke_off_is_not_taken_for_whole(hub, in_safetensors, tmp_path):
    hub.add("some/model", in_safetensors)
    hub.fail("tokenizer_config.json", 404)
    with pytest.raises(RunError, match="404"):
        find_source("some/model", str(tmp_path))
    hub.fail("", 500)
    with pytest.raises(RunError, match="500"):  # and not what lies in the cache, without a tokenizer
        find_source("some/model", str(tmp_path))


@pytest.mark.parametrize("how", [500, 429, 401, "cut", "hang", "page"])
def test_what_is_in_the_cache_does_where_the_hub_does_not(how, hub, in_safetensors, tmp_path, said):
    hub.add("some/model", in_safetensors)
    files = weight_files(find_source("some/model", str(tmp_path)))
    hub.fail("", how)
    asked = len(hub.requests)
    assert weight_files(find_source("some/model", str(tmp_path))) == files
    assert len(hub.requests) == asked + 1
    assert [line for line in said() if line.startswith("some/model: ") and "going on with what is in" in line]


def test_offline_gives_the_route_that_needs_no_hub(hub, in_safetensors, tokenizer_model, tmp_path, monkeypatch):
    hub.add("some/model", in_safetensors)
    find_source("some/model", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"--model other/model: HF_HUB_OFFLINE is set; .*offline, give .*'smollm2'"):
        find_source("other/model", str(tmp_path))
    with pytest.raises(RunError, match=r"--model some/model: its weights are not in .*HF_HUB_OFFLINE is set"):
        weight_files(find_source("some/model", str(tmp_path)))
    with pytest.raises(RunError, match=r"--eval_data ptb: HF_HUB_OFFLINE is set; .*offline, give .*'pydoc'"):
        evaluation_windows("ptb", None, seqlen=16, cache_dir=str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9 cannot be reached \(.*refused\); .*offline, give .*'smollm2'"):
        find_source("other/model", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(RunError, match=r"HF_ENDPOINT hub\.example is no address"):
        find_source("other/model", str(tmp_path))


def test_a_shard_that_is_not_there_is_named(hub, llama, tmp_path, monkeypatch):
    hub.add("some/model", {name: contents for name, contents in llama.items() if name != BIN.format(2)})
    source = find_source("some/model", str(tmp_path))
    with pytest.raises(RunError, match=rf"{BIN.format(2)}, which {INDEX} names, is not in the repository"):
        load_model(source, "cpu")
    hub.add("some/model", llama)
    hub.fail(BIN.format(2), 500)
    with pytest.raises(RunError, match="500"):
        load_model(find_source("some/model", str(tmp_path)), "cpu")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=rf"{BIN.format(2)}, .* is not in .*, and HF_HUB_OFFLINE is set"):
        load_model(find_source("some/model", str(tmp_path)), "cpu")


def test_a_repository_that_is_no_model_says_what_it_is(hub, llama, tmp_path):
    hub.add("some/gguf", {"model-Q4_K_M.gguf": b"x", "README.md": "x"})
    hub.add("some/adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b"x"})
    hub.add("some/old-adapter", {"adapter_model.bin": b"x"})
    hub.add("with/adapter", {**llama, "adapter_model.bin": b"x"})
    hub.add("some/notes", {"README.md": "x"})
    hub.add("gguf/weights", {**without_weights(llama), "model-Q4_K_M.gguf": b"x"})
    with pytest.raises(RunError, match=r"--model gguf/weights: holds GGUF files; .* model-Q4_K_M\.gguf"):
        load_model(find_source("gguf/weights", str(tmp_path)), "cpu")
    hub.add("no/weights", without_weights(llama))
    for name, says in {
        "some/gguf": "model-Q4_K_M.gguf",
        "some/adapter": "adapter",
        "some/old-adapter": "adapter",
        "with/adapter": r"holds an adapter \(adapter_model\.bin\)",
        "some/notes": "config.json",
    }.items():
        with pytest.raises(RunError, match=f"--model {name}: .*{says}"):
            find_source(name, str(tmp_path))
    with pytest.raises(RunError, match=r"--model no/weights: its weights are none of model\.safetensors"):
        load_model(find_source("no/weights", str(tmp_path)), "cpu")
    with pytest.raises(RunError, match="--model a name: cannot be a name on the hub"):
        find_source("a name", str(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(hub, llama, tmp_path):
    hub.add("some/model", llama)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=rf"--cache_dir {tmp_path}/file/cache: cannot be written: Not a directory"):
        find_source("some/model", str(tmp_path / "file" / "cache"))
