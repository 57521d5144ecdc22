"""Local texts in every form, against the text they were made of and the published way of drawing from c4."""

import codecs
import datetime
import functools
import gzip
import json
import random

import pyarrow
import pytest
import torch
from pieces import model_folder, train
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib import RunError, calibration_windows, evaluation_windows, find_source, load_tokenizer, texts
from lib.data import find_corpus

TEXT = "naïve café\nthe river ★ and the stone house\n" * 8
DOCUMENTS = [f"{i}: " + "the river ★ " * (i % 7) for i in range(60)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% if m.name is defined %}!{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_tokenizer(find_source(str(model_folder(tmp_path_factory.mktemp("model") / "llama", train()))))


def ids(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text).input_ids)


def zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def lines(documents: list[str], **more) -> bytes:
    return "".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in documents).encode()


def marked(mark: bytes, encoding: str):
    return lambda data: mark + data.decode().encode(encoding)


WRITTEN = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, "unpacked.gz": bytes,
    "two members.gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "utf-8": marked(codecs.BOM_UTF8, "utf-8"), "utf-16": marked(codecs.BOM_UTF16_LE, "utf-16-le"),
    "big endian": marked(codecs.BOM_UTF16_BE, "utf-16-be"), "utf-32": marked(codecs.BOM_UTF32_LE, "utf-32-le"),
    "skippable.zst": lambda data: b"\x53\x2a\x4d\x18\x04\0\0\0skip" + zstd(data),
    "marked.gz": lambda data: gzip.compress(codecs.BOM_UTF8 + data),
    "marked.zst": lambda data: zstd(marked(codecs.BOM_UTF16_LE, "utf-16-le")(data)),
}  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN)
def test_a_text_is_the_same_in_every_form(written, tokenizer, tmp_path):
    packed = f".{written.rpartition('.')[2]}" if "." in written else ""
    (tmp_path / f"a.txt{packed}").write_bytes(WRITTEN[written](TEXT.encode()))
    windows = evaluation_windows(str(tmp_path / f"a.txt{packed}"), tokenizer, seqlen=16)
    assert torch.equal(windows.flatten(), ids(tokenizer, TEXT)[: windows.numel()])
    for suffix in ("json", "jsonl"):
        path = tmp_path / f"rows.{suffix}{packed}"
        path.write_bytes(WRITTEN[written](b"\n" + lines(DOCUMENTS, url="x") + b" \n"))
        assert list(texts.rows("", path, "")) == DOCUMENTS
        numbered = texts.indexed_rows("", path, "")
        assert len(numbered) == len(DOCUMENTS)
        assert [numbered[i] for i in (59, 0, 31)] == [DOCUMENTS[i] for i in (59, 0, 31)]
    path = tmp_path / f"array.json{packed}"
    path.write_bytes(WRITTEN[written](json.dumps([{"text": text} for text in DOCUMENTS], indent=1).encode()))
    assert list(texts.rows("", path, "")) == DOCUMENTS == list(texts.indexed_rows("", path, ""))


def drawn(tokenizer, documents: list[str], nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """As the published code draws from c4."""
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(documents) - 1)
            tokens = ids(tokenizer, documents[i])
            if len(tokens) > seqlen:
                break
        i = random.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[i : i + seqlen])
    return torch.stack(windows)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    (folder / "c4.json.gz").write_bytes(gzip.compress(lines(DOCUMENTS, url="", timestamp="")))
    (folder / "c4.jsonl.zst").write_bytes(zstd(lines(DOCUMENTS)))
    (folder / "c4.jsonl").write_bytes(lines(DOCUMENTS))
    table = Dataset.from_dict({"url": [""] * len(DOCUMENTS), "text": DOCUMENTS})
    table.to_parquet(folder / "c4.parquet")
    table.save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize("name", ["c4.json.gz", "c4.jsonl.zst", "c4.jsonl", "c4.parquet", "saved"])
def test_a_shard_is_drawn_from_as_c4_is(name, llama, shards):
    found = calibration_windows(f"c4:{shards / name}", llama, nsamples=12, seqlen=20, seed=3)
    assert torch.equal(found, drawn(llama, DOCUMENTS, 12, 20, 3))
    assert not torch.equal(found, calibration_windows(str(shards / name), llama, nsamples=12, seqlen=20, seed=3))


def test_a_shard_is_parsed_only_where_it_is_drawn_from(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "c4.jsonl.gz").write_bytes(gzip.compress(lines(["x" * 50] * 5000)))
    seen, own = [], texts._parsed
    monkeypatch.setattr(texts, "_parsed", lambda asked, number, line: seen.append(number) or own(asked, number, line))
    calibration_windows(f"c4:{tmp_path}/c4.jsonl.gz", tokenizer, nsamples=7, seqlen=20, seed=0)
    assert len(seen) == 7


def test_a_shard_is_evaluated_as_c4_is(tokenizer, tmp_path, monkeypatch):
    documents = [f"document {i}" for i in range(1300)]
    (tmp_path / "c4.jsonl").write_bytes(lines(documents))
    whole = ids(tokenizer, " ".join(documents[:1100]))
    windows = evaluation_windows(f"c4:{tmp_path}/c4.jsonl", tokenizer, seqlen=100)
    assert torch.equal(windows.flatten(), whole[: len(whole) // 100 * 100])
    assert len(windows) < 256
    windows = evaluation_windows(f"c4:{tmp_path}/c4.jsonl", tokenizer, seqlen=10)
    assert torch.equal(windows.flatten(), whole[:2560])


def test_bos_begins_every_window_where_asked(llama, shards):
    bare = [ids(llama, text)[1:] for text in DOCUMENTS]
    rng, expected = random.Random(1), []
    while len(expected) < 9:
        tokens = bare[rng.randint(0, len(bare) - 1)]
        if len(tokens) > 19:
            start = rng.randint(0, len(tokens) - 20)
            expected.append([1, *tokens[start : start + 19].tolist()])
    options = {"nsamples": 6, "held_out": 3, "seqlen": 20, "add_bos": "every"}
    windows = calibration_windows(f"c4:{shards}/c4.jsonl", llama, seed=1, **options)
    assert windows[:6].tolist() == expected[:6]
    windows = calibration_windows(f"{shards}/c4.jsonl", llama, seed=1, **options)
    whole, rng = ids(llama, " ".join(DOCUMENTS))[1:], random.Random(1)
    starts = [rng.randint(0, len(whole) - 20) for _ in range(6)]
    assert windows[:6].tolist() == [[1, *whole[s : s + 19].tolist()] for s in starts]
    assert windows[6:, 0].tolist() == [1, 1, 1]


def test_without_bos_every_is_one_line(tokenizer, shards):
    for cut in (
        lambda **k: evaluation_windows(f"{shards}/c4.jsonl", tokenizer, seqlen=8, **k),
        lambda **k: calibration_windows(f"{shards}/c4.jsonl", tokenizer, seqlen=8, nsamples=1, seed=0, **k),
    ):
        assert cut(add_bos="once").shape[1] == 8
        with pytest.raises(RunError, match="--add_bos every: the model's tokenizer has no BOS"):
            cut(add_bos="every")


@pytest.fixture
def conversations(tmp_path):
    from datasets import Dataset

    named = {1: {"name": "x"}}
    talks = [
        [{"role": "user", "content": f"river {i}"}, {"role": "assistant", "content": "stone"} | named.get(i, {})]
        for i in range(3)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    Dataset.from_list([{"messages": talk} for talk in talks]).to_parquet(tmp_path / "talk.parquet")
    return [f"[user]river {i}[assistant]stone" + "!" * (i == 1) for i in range(3)], tmp_path


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.parquet"])
def test_conversations_go_through_the_chat_template(name, llama, tokenizer, conversations, monkeypatch):
    said, folder = conversations
    monkeypatch.setattr(llama, "chat_template", TEMPLATE)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    for own in (llama, tokenizer):  # the one has a BOS, which stays one
        windows = evaluation_windows(f"{folder}/{name}", own, seqlen=8)
        assert torch.equal(windows.flatten(), ids(own, "\n\n".join(said))[: windows.numel()])
    one = calibration_windows(f"c4:{folder}/{name}", llama, nsamples=2, seqlen=8, seed=0)
    assert torch.equal(one, drawn(llama, said, 2, 8, 0))


def test_conversations_that_fit_no_template_are_one_line(tokenizer, conversations, monkeypatch):
    path = f"{conversations[1]}/talk.jsonl"
    with pytest.raises(RunError, match=f"--eval_data {path}: .*'messages'.* has no chat template"):
        evaluation_windows(path, tokenizer, seqlen=8)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users here') }}", raising=False)
    with pytest.raises(RunError, match=r"does not fit .* chat template \(no users here\)"):
        evaluation_windows(path, tokenizer, seqlen=8)


@pytest.mark.parametrize("held", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_a_column_of_text_in_parquet_may_be_held_in_any_way(held, tmp_path):
    column = pyarrow.array(DOCUMENTS).cast(held)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=7)
    assert list(texts.rows("", tmp_path / "a.parquet", "")) == DOCUMENTS


def test_what_else_a_message_holds_in_parquet_may_be_no_json(tmp_path):
    talk = [{"role": "user", "content": "river", "at": datetime.datetime(2020, 1, 1)}]
    parquet.write_table(pyarrow.table({"messages": [talk]}), tmp_path / "a.parquet")
    assert [row[0]["content"] for row in texts.rows("", tmp_path / "a.parquet", "")] == ["river"]


def test_of_a_message_only_its_content_may_be_null(tmp_path):
    talk = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "river"}]
    parquet.write_table(pyarrow.table({"messages": [talk]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    for name in ("a.parquet", "a.jsonl"):
        assert list(texts.rows("", tmp_path / name, "")) == [talk]


def test_with_bos_in_every_window_a_template_puts_no_second_one(tmp_path):
    backend = Tokenizer(models.WordLevel({"[BOS]": 0, "river": 1, "[u]": 2}, unk_token="river"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[BOS]")
    own.chat_template = "{{ bos_token }} [u] {{ messages[0].content }}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "river " * 5}]}))
    cut = functools.partial(evaluation_windows, str(tmp_path / "a.jsonl"), own, seqlen=4)
    assert cut()[0].tolist() == [0, 2, 1, 1]  # which the tokenizer does not put there itself
    assert cut(add_bos="every")[0].tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("name", ["", "c4:"])
def test_no_path_is_no_folder(name):
    with pytest.raises(RunError, match=f"--calib_data: '{name}' is unknown"):
        find_corpus("--calib_data", name)


def test_a_path_behind_c4_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS))
    assert list(find_corpus("--calib_data", "c4:~/a.jsonl").rows("calibration", "")) == DOCUMENTS


GOOD = lines(["text " * 9])
WRONG = {
    "empty.txt": (b"", "is empty"),
    "empty.jsonl": (b"", "is empty"),
    "empty.json.gz": (gzip.compress(b""), "is empty"),
    "blank.json": (b"\n \n", "is empty"),
    "none.json": (b"[]", "is empty"),
    "cut.jsonl": (GOOD + GOOD[:12], "row 2 is no line of JSON"),
    "list.jsonl": (GOOD + b"[1]", "row 2 is no JSON object"),
    "number.jsonl": (GOOD + b'{"text": 1}', "row 2 .*'text' is not text"),
    "other.jsonl": (b'{"body": "a", "url": "b"}', "row 1: has no column 'text' .*only body, url"),
    "talk.jsonl": (b'{"messages": "a"}', "row 1 .*'messages' is no list of messages"),
    "half.jsonl": (b'{"text": "a\\ud800b"}', "row 1 holds half of a surrogate pair"),
    "latin.txt": ("naïve".encode("latin-1"), "is not utf-8"),
    "latin.jsonl": (b'{"text": "na\xefve"}', "is not utf-8"),
    "unmarked.txt": (TEXT.encode("utf-16-le"), r"holds zero bytes \(UTF-16 without a byte-order mark,"),
    "xz.txt.gz": (b"\xfd7zXZ\0\0\4", "holds zero bytes .* packed with neither gzip nor zstd"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(999))[:500], "cannot be read .*[Tt]runcated"),
    "cut.jsonl.zst": (zstd(random.Random(0).randbytes(999))[:500], "cannot be read .*[Tt]runcated"),
    "false.parquet": (b"PAR1", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_line(name, tokenizer, tmp_path):
    content, says = WRONG[name]
    (tmp_path / name).write_bytes(content)
    for before in ("",) if ".txt" in name else ("", "c4:"):
        asked = f"{before}{tmp_path / name}"
        with pytest.raises(RunError, match=f"--eval_data {asked}: {says}"):
            evaluation_windows(asked, tokenizer, seqlen=8)
        with pytest.raises(RunError, match=f"--calib_data {asked}: {says}"):
            calibration_windows(asked, tokenizer, seqlen=8, nsamples=20, seed=0)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz", "a.txt.bz2", "a.gz"])
def test_other_files_are_refused_before_they_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    for asked in (f"{tmp_path}/{name}", f"c4:{tmp_path}/{name}"):
        with pytest.raises(RunError, match=r"must end in one of .txt, .json, .jsonl, .parquet .* .gz or .zst"):
            find_corpus("--calib_data", asked)
    with pytest.raises(RunError, match=r"--calib_data c4:/none/a.json.gz: no such file"):
        find_corpus("--calib_data", "c4:/none/a.json.gz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(RunError, match=r"a.txt: c4: draws documents, and a .txt is one"):
        find_corpus("--calib_data", f"c4:{tmp_path}/a.txt")


def test_a_full_disk_names_the_folder(tokenizer, tmp_path, monkeypatch):
    class Full:
        def write(self, _line):
            raise OSError(28, "No space left on device")

    (tmp_path / "c4.jsonl.gz").write_bytes(gzip.compress(GOOD))
    monkeypatch.setattr(texts.tempfile, "TemporaryFile", Full)
    with pytest.raises(RunError, match=r"does not fit, unpacked, into .*TMPDIR"):
        calibration_windows(f"c4:{tmp_path}/c4.jsonl.gz", tokenizer, seqlen=8, nsamples=1, seed=0)
