"""Text to windows of tokens, for calibration and for evaluation.

The protocols are those of GPTQ, SparseGPT, Wanda and AlphaPruning, so that perplexities compare with theirs.
"""

import functools
import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import hub
from .errors import RunError
from .registry import unknown_name

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
DRAWS = 10_000  # tries to find room for the windows held out
C4_EVALUATED, C4_WINDOWS = 1100, 256  # documents of the validation shard, and windows of them at most
C4_MISSES = 10_000  # documents in a row that may be too short before c4 is given up


@dataclass(frozen=True)
class Corpus:
    """rows(split, cache_dir) -> texts, split being "calibration" or "evaluation"; and what joins each split's rows."""

    rows: Callable[[str, str], list[str]]
    calibration_join: str = " "
    evaluation_join: str = "\n\n"
    by_document: bool = False  # calibration windows each from a document of its own
    evaluation_windows: int | None = None  # the first so many, where the protocol says so


def calibration_windows(
    name: str, tokenizer, *, nsamples: int, seqlen: int, seed: int, held_out: int = 0, cache_dir: str = "llm_weights"
) -> Tensor:
    """Windows of `seqlen` tokens cut at random from a corpus; (nsamples + held_out, seqlen), int64.

    The corpus is joined with a space and tokenised once; window k begins at the k-th
    randint(0, tokens - seqlen - 1) after seeding Python's generator. From c4 each window comes from a random
    document that is longer than it. The last `held_out` are drawn after the others, and again until they have no token
    in common with any. Raises RunError where the corpus is too short.
    """
    corpus, rng = find_corpus("--calib_data", name), random.Random(seed)
    rows = _read("--calib_data", name, corpus, "calibration", cache_dir)
    if corpus.by_document:
        draw = functools.partial(_in_long_document, rows, tokenizer, seqlen, rng)
    else:
        tokens = _tokenize(tokenizer, corpus.calibration_join.join(rows))
        if len(tokens) <= seqlen:
            raise RunError(
                f"--calib_data {name}: has {len(tokens)} tokens, not more than one window of --seqlen {seqlen}"
            )

        def draw() -> tuple[int, int, Tensor]:
            start = rng.randint(0, len(tokens) - seqlen - 1)
            return 0, start, tokens[start : start + seqlen]

    drawn = [draw() for _ in range(nsamples)]
    for _ in range(DRAWS):
        if len(drawn) == nsamples + held_out:
            break
        document, start, window = draw()
        if all(document != other or abs(start - begin) >= seqlen for other, begin, _ in drawn):
            drawn.append((document, start, window))
    else:
        raise RunError(
            f"--calib_data {name}: has no room for {held_out} windows apart from the {nsamples} of --nsamples, which "
            "the choice of an allocation needs; ask for fewer, or give more text"
        )
    return torch.stack([window for _, _, window in drawn])


def evaluation_windows(
    name: str, tokenizer, *, seqlen: int, limit: int | None = None, cache_dir: str = "llm_weights"
) -> Tensor:
    """The corpus joined (two newlines), tokenised once and cut into whole windows; (windows, seqlen), int64.

    What is left at the end is dropped; `limit` keeps the first windows only. c4 is its first validation shard's first
    1100 documents, joined with a space, and at most 256 windows of them. Raises RunError where there are fewer windows
    than asked for, or none.
    """
    corpus = find_corpus("--eval_data", name)
    rows = _read("--eval_data", name, corpus, "evaluation", cache_dir)
    tokens = _tokenize(tokenizer, corpus.evaluation_join.join(rows))
    count = min(len(tokens) // seqlen, corpus.evaluation_windows or len(tokens))
    if count == 0:
        raise RunError(f"--eval_data {name}: has {len(tokens)} tokens, less than one window of --seqlen {seqlen}")
    if limit is not None and limit > count:
        raise RunError(f"--eval_windows {limit}: --eval_data {name} has only {count} windows of {seqlen} tokens")
    return tokens[: count * seqlen].view(count, seqlen)[:limit]


def find_corpus(flag: str, name: str) -> Corpus:
    """The corpus of that name or path; RunError naming `flag` where there is none. Reads no text."""
    if name in CORPORA:
        return CORPORA[name]
    path = Path(name)
    if path.is_dir() or path.suffix in SUFFIXES:
        if not path.exists():
            raise RunError(f"{flag} {name}: no such file")
        # A .txt is one row and so used verbatim, whatever would join it.
        return Corpus(lambda split, _: _local_rows(flag, path, split))
    if path.exists():
        raise RunError(f"{flag} {name}: a file must end in one of {', '.join(SUFFIXES)}")
    raise unknown_name(flag, name, [*CORPORA, "a path to a " + ", ".join(SUFFIXES) + " or a saved data set"])


def _read(flag: str, name: str, corpus: Corpus, split: str, cache_dir: str) -> Iterable[str]:
    """The corpus's rows; whatever keeps a library from reading it ends in one line."""
    try:
        return corpus.rows(split, cache_dir)
    except RunError:
        raise
    except Exception as error:  # datasets and pyarrow have no common base class
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise RunError(f"{flag} {name}: cannot be read ({reason})") from error


@dataclass(frozen=True)
class HubText:
    """One file a split of a data set on the hub, as the protocols read them."""

    name: str
    repository: str
    files: dict[str, str]
    revision: str = "main"

    def path(self, split: str, cache_dir: str) -> Path:
        """The split's file, fetched if need be."""
        flag = {"calibration": "--calib_data", "evaluation": "--eval_data"}[split]
        repository = hub.Repository(self.repository, "dataset", cache_dir, f"{flag} {self.name}")
        return hub.fetch_data(repository, self.files[split], self.revision)


def _parquet(text: HubText, column: str) -> Callable[[str, str], list[str]]:
    def rows(split: str, cache_dir: str) -> list[str]:
        from pyarrow import parquet  # takes a moment to import, and other texts do without

        return parquet.read_table(text.path(split, cache_dir), columns=[column])[column].to_pylist()

    return rows


def _c4_rows(split: str, cache_dir: str) -> list[str]:
    rows = documents(C4.path(split, cache_dir))
    return list(itertools.islice(rows, C4_EVALUATED) if split == "evaluation" else rows)


def documents(path: Path) -> Iterator[str]:
    """The texts of a shard of c4: gzipped JSON lines with a column `text`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _pydoc_rows(split: str, cache_dir: str = "") -> list[str]:
    """The language reference inside every CPython: its topics in alphabetical order, every other one to each part.

    Some topics hold others, or parts of them, so evaluation leaves out every paragraph that calibration has.
    """
    from pydoc_data.topics import topics

    def key(paragraph: str) -> str:
        return " ".join(paragraph.split())

    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    calibration = texts[0::2]
    if split == "calibration":
        return calibration
    seen = {key(paragraph) for text in calibration for paragraph in text.split("\n\n")}
    return ["\n\n".join(p for p in text.split("\n\n") if key(p) not in seen) for text in texts[1::2]]


def _local_rows(flag: str, path: Path, split: str) -> list[str]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    import datasets

    if path.is_dir():
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            part = "train" if split == "calibration" else "test"
            if part not in data:
                raise RunError(f"{flag} {path}: has no split '{part}', only {', '.join(data)}")
            data = data[part]
    else:
        kind = "parquet" if path.suffix == ".parquet" else "json"
        data = datasets.load_dataset(kind, data_files=str(path), split="train")
    if "text" not in data.column_names:
        raise RunError(f"{flag} {path}: has no column 'text', only {', '.join(data.column_names)}")
    texts = data["text"]
    if not all(isinstance(text, str) for text in texts):
        raise RunError(f"{flag} {path}: a row of its column 'text' is not text (null or a number)")
    return texts


def _tokenize(tokenizer, text: str) -> Tensor:
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def _in_long_document(rows: list[str], tokenizer, seqlen: int, rng: random.Random) -> tuple[int, int, Tensor]:
    """A random window: its document, where in it the window begins, and its tokens."""
    for _ in range(C4_MISSES):
        document = rng.randint(0, len(rows) - 1)
        tokens = _tokenize(tokenizer, rows[document])
        if len(tokens) > seqlen:
            start = rng.randint(0, len(tokens) - seqlen - 1)
            return document, start, tokens[start : start + seqlen]
    raise RunError(f"--calib_data c4: none of {C4_MISSES} documents is longer than --seqlen {seqlen}")


C4 = HubText(
    "c4", "allenai/c4",
    {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
)  # fmt: skip
_WIKITEXT2 = HubText(
    "wikitext2", "Salesforce/wikitext",
    {
        "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    },
)  # fmt: skip
# Its main branch is a script, which nothing runs any longer; the hub keeps what it gave beside it.
_PTB = HubText(
    "ptb", "ptb-text-only/ptb_text_only",
    {"calibration": "penn_treebank/train/0000.parquet", "evaluation": "penn_treebank/test/0000.parquet"},
    revision="refs/convert/parquet",
)  # fmt: skip

CORPORA: dict[str, Corpus] = {
    "c4": Corpus(_c4_rows, evaluation_join=" ", by_document=True, evaluation_windows=C4_WINDOWS),
    "wikitext2": Corpus(_parquet(_WIKITEXT2, "text")),
    "ptb": Corpus(_parquet(_PTB, "sentence"), evaluation_join=" "),
    "pydoc": Corpus(_pydoc_rows),
}
