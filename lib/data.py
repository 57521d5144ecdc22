"""Text to windows of tokens, for calibration and for evaluation.

The protocols are those of GPTQ, SparseGPT, Wanda and AlphaPruning, so that perplexities compare with theirs.
"""

import functools
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import hub, texts, tokens
from .errors import RunError, reason_of
from .registry import unknown_name
from .texts import Row

log = logging.getLogger(__name__)

ADD_BOS = ("once", "every")
SAMPLED = "self"  # in place of a corpus to calibrate on: what the dense model writes (lib/sampling.py)
C4_PREFIX = "c4:"  # before a path: drawn and evaluated as c4 is
FLAGS = {"calibration": "--calib_data", "evaluation": "--eval_data", "training": "--data"}
PARTS = {"calibration": "train", "evaluation": "test", "training": "train"}  # of a saved folder that has several
RUN = 32  # tokens in a row that two texts have in common where one holds a part of the other
DRAWS = 10_000  # tries to find room for the windows held out
TRIES = 100  # to find room for a further window
C4_EVALUATED, C4_WINDOWS = 1100, 256  # documents of the validation shard, and windows of them at most
C4_MISSES = 10_000  # documents in a row that may be too short before c4 is given up


@dataclass(frozen=True)
class Corpus:
    """rows(split, cache_dir) -> texts, split being "calibration" or "evaluation"; and what joins each split's rows.
    Of "training" they are those of calibration.

    A row may be a conversation too, which goes through the tokenizer's chat template.
    """

    rows: Callable[[str, str], Sequence[Row]]
    calibration_join: str = " "
    evaluation_join: str = "\n\n"
    by_document: bool = False  # calibration windows each from a document of its own
    evaluation_windows: int | None = None  # the first so many, where the protocol says so


def calibration_windows(
    name: str,
    tokenizer,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    held_out: int = 0,
    recovery: int = 0,
    add_bos: str = "once",
    cache_dir: str = "llm_weights",
) -> Tensor:
    """Windows of `seqlen` tokens cut at random from a corpus; (nsamples + held_out + recovery, seqlen), int64.

    The corpus is joined with a space and tokenised once; window k begins at the k-th
    randint(0, tokens - seqlen - 1) after seeding Python's generator. From c4 each window comes from a random
    document that is longer than it. `held_out` are drawn after these, and again until they have no token in common with
    any. Last come `recovery` windows to train on, which have none in common with those held out and, as far as TRIES
    draws find such places, with any other. With `add_bos` "every" the text is tokenised without special tokens and a
    window is BOS and seqlen - 1 tokens of it. Raises RunError where the corpus is too short.
    """
    label, rng = f"--calib_data {name}", random.Random(seed)
    corpus, prefix = find_corpus("--calib_data", name), _prefix(tokenizer, add_bos)
    width = seqlen - len(prefix)
    with texts.read_errors(label):
        rows = corpus.rows("calibration", cache_dir)
    if corpus.by_document:

        def encode(row: Row) -> Tensor:
            return tokens.encode(tokenizer, _text(label, tokenizer, row, add_bos), special=not len(prefix))

        draw = functools.partial(_in_long_document, label, rows, encode, width, rng)
    else:
        text = _joined(label, tokenizer, rows, corpus.calibration_join, add_bos)
        found = tokens.encode(tokenizer, text, special=not len(prefix))
        if len(found) <= width:
            raise RunError(f"{label}: has {len(found)} tokens, not more than one window of --seqlen {seqlen}")

        def draw() -> tuple[int, int, Tensor]:
            start = rng.randint(0, len(found) - width - 1)
            return 0, start, found[start : start + width]

    def disjoint(window: tuple[int, int, Tensor], others: list[tuple[int, int, Tensor]]) -> bool:
        return all(window[0] != document or abs(window[1] - start) >= width for document, start, _ in others)

    drawn = [draw() for _ in range(nsamples)]
    for _ in range(DRAWS):
        if len(drawn) == nsamples + held_out:
            break
        if disjoint(window := draw(), drawn):
            drawn.append(window)
    else:
        raise RunError(
            f"{label}: has no room for {held_out} windows apart from the {nsamples} of --nsamples, which "
            "the choice of an allocation needs; ask for fewer, or give more text"
        )
    reserved, overlapping = drawn[nsamples:], 0
    for number in range(recovery):
        chosen = drawn[number % nsamples]  # where nothing else is found
        for window in (draw() for _ in range(TRIES)):
            if disjoint(window, drawn):
                chosen = window
                break
            if disjoint(window, reserved):
                chosen = window
        else:
            overlapping += 1
        drawn.append(chosen)
    if overlapping:
        log.warning("%s: is short: %d of the windows that recovery trains on overlap others", label, overlapping)
    return torch.stack([torch.cat([prefix, window]) for _, _, window in drawn])


def evaluation_windows(
    name: str,
    tokenizer,
    *,
    seqlen: int,
    limit: int | None = None,
    add_bos: str = "once",
    cache_dir: str = "llm_weights",
) -> Tensor:
    """The corpus joined (two newlines), tokenised once and cut into whole windows; (windows, seqlen), int64.

    What is left at the end is dropped; `limit` keeps the first windows only. c4 is its first validation shard's first
    1100 documents, joined with a space, and at most 256 windows of them. `add_bos` as for `calibration_windows`. Raises
    RunError where there are fewer windows than asked for, or none.
    """
    label = f"--eval_data {name}"
    corpus, prefix = find_corpus("--eval_data", name), _prefix(tokenizer, add_bos)
    width = seqlen - len(prefix)
    with texts.read_errors(label):
        rows = corpus.rows("evaluation", cache_dir)
    text = _joined(label, tokenizer, rows, corpus.evaluation_join, add_bos)
    found = tokens.encode(tokenizer, text, special=not len(prefix))
    count = min(len(found) // width, corpus.evaluation_windows or len(found))
    if count == 0:
        raise RunError(f"{label}: has {len(found)} tokens, less than one window of --seqlen {seqlen}")
    if limit is not None and limit > count:
        raise RunError(f"--eval_windows {limit}: {label} has only {count} windows of {seqlen} tokens")
    windows = found[: count * width].view(count, width)[:limit]
    return torch.cat([prefix.expand(len(windows), -1), windows], dim=1)


def training_windows(
    name: str,
    tokenizer,
    *,
    nsamples: int | None,
    held_out: int,
    seqlen: int,
    seed: int,
    exclude: Tensor | None = None,
    max_windows: int = 1024,
    add_bos: str = "once",
    cache_dir: str = "llm_weights",
) -> tuple[Tensor, Tensor]:
    """Windows to train on, (nsamples, seqlen), and windows of the same text held out, (held_out, seqlen), int64.

    The corpus of calibration is joined, tokenised once and cut into whole windows, so that no two have a token in
    common; of c4 its documents in random order, each tokenised on its own, as many as are needed. Windows that have RUN
    tokens in a row in common with any of `exclude` (n, seqlen) are left out. Which are held out, and the order of the
    others, is random by the seed. With `nsamples` None all windows are taken, at most `max_windows`. Raises RunError
    where there are fewer than asked for.
    """
    label, rng = f"--data {name}", random.Random(seed)
    corpus, prefix = find_corpus("--data", name), _prefix(tokenizer, add_bos)
    width, wanted = seqlen - len(prefix), held_out + (nsamples or max_windows)
    with texts.read_errors(label):
        rows = corpus.rows("training", cache_dir)
    if corpus.by_document:
        order = rng.sample(range(len(rows)), len(rows))
        documents = (
            tokens.encode(tokenizer, _document(label, tokenizer, rows, i, add_bos), not len(prefix)) for i in order
        )
    else:
        text = _joined(label, tokenizer, rows, corpus.calibration_join, add_bos)
        documents = iter([tokens.encode(tokenizer, text, special=not len(prefix))])
    windows, rest, shared = torch.empty(0, width, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0
    known = None if exclude is None else _runs(exclude[:, len(prefix) :]).unique()
    for found in documents:
        rest = torch.cat([rest, found])
        if len(rest) < width:
            continue
        cut, rest = rest[: len(rest) // width * width].view(-1, width), rest[len(rest) // width * width :]
        if known is not None:
            new = ~torch.isin(_runs(cut), known).any(1)
            cut, shared = cut[new], shared + int((~new).sum())
        windows = torch.cat([windows, cut])
        if corpus.by_document and len(windows) >= wanted:
            break
    least = held_out + (nsamples or 1)
    if len(windows) < least:
        also = f", beside {shared} that hold text of --eval_data" if shared else ""
        raise RunError(
            f"{label}: has {len(windows)} windows of {seqlen} tokens{also}, fewer than the {least} of --nsamples and "
            "--validation_windows; ask for fewer, or lower --seqlen"
        )
    windows = windows[rng.sample(range(len(windows)), len(windows))][:wanted]
    windows = torch.cat([prefix.expand(len(windows), -1), windows], dim=1)
    return windows[held_out:], windows[:held_out]


def _runs(windows: Tensor) -> Tensor:
    """A number for every RUN tokens in a row of windows (n, seqlen), or for all of a shorter one: (n, runs), int64."""
    length = min(RUN, windows.shape[1])
    runs = windows.shape[1] - length + 1
    found = torch.zeros(len(windows), runs, dtype=torch.int64)
    for i in range(length):  # a polynomial modulo 2^64
        found = found * 6364136223846793005 + windows[:, i : i + runs] + 1
    return found


def find_corpus(flag: str, name: str) -> Corpus:
    """The corpus of that name or path; RunError naming `flag` where there is none. Reads no text."""
    if name in CORPORA:
        return CORPORA[name]
    path = Path(bare := name.removeprefix(C4_PREFIX)).expanduser()
    if (bare and path.is_dir()) or texts.file_format(path):
        if not path.exists():
            raise RunError(f"{flag} {name}: no such file")
        label = f"{flag} {name}"
        if name.startswith(C4_PREFIX):
            if texts.file_format(path) == ".txt":
                raise RunError(f"{label}: {C4_PREFIX} draws documents, and a .txt is one; give rows of JSON or parquet")
            return _c4(lambda split, _: (label, path))
        # A .txt is one row and so used verbatim, whatever would join it.
        return Corpus(lambda split, _: texts.rows(label, path, PARTS[split]))
    accepted = f"{', '.join(texts.SUFFIXES)} (all but parquet also with {' or '.join(texts.PACKED)})"
    if bare and path.exists():
        raise RunError(f"{flag} {name}: a file must end in one of {accepted}")
    own = [SAMPLED] if flag == FLAGS["calibration"] else []
    raise unknown_name(
        flag, name, [*CORPORA, *own, f"a path to a {accepted} or a saved data set", f"{C4_PREFIX} and such a path"]
    )


def _prefix(tokenizer, add_bos: str) -> Tensor:
    """What every window begins with: BOS or nothing."""
    return torch.tensor([required_bos(tokenizer)] if add_bos == "every" else [], dtype=torch.int64)


def required_bos(tokenizer) -> int:
    """The BOS of --add_bos every. Raises RunError where the tokenizer has none."""
    bos = tokens.bos(tokenizer)
    if bos is None:
        raise RunError("--add_bos every: the model's tokenizer has no BOS; leave it at once")
    return bos


def _joined(label: str, tokenizer, rows: Sequence[Row], join: str, add_bos: str) -> str:
    with texts.read_errors(label):
        rows = list(rows)
    text = join.join(_text(label, tokenizer, row, add_bos) for row in rows)
    if not text:
        raise RunError(f"{label}: is empty")
    return text


def _document(label: str, tokenizer, rows: Sequence[Row], number: int, add_bos: str) -> str:
    with texts.read_errors(label):
        row = rows[number]
    return _text(label, tokenizer, row, add_bos)


def _text(label: str, tokenizer, row: Row, add_bos: str) -> str:
    """A row as text, a conversation through the tokenizer's chat template."""
    if isinstance(row, str):
        return row
    if not getattr(tokenizer, "chat_template", None):
        raise RunError(f"{label}: holds conversations ('messages'), and the model's tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(row, tokenize=False)
    except Exception as error:  # a template is a program of the model's own
        reason = reason_of(error)
        raise RunError(f"{label}: a row does not fit the tokenizer's chat template ({reason})") from error
    # The template's own BOS would be a second one.
    begun = add_bos == "every" or tokens.prefix(tokenizer)
    return text.removeprefix(tokenizer.bos_token or "") if begun else text


@dataclass(frozen=True)
class HubText:
    """One file a split of a data set on the hub, as the protocols read them."""

    name: str
    repository: str
    files: dict[str, str]
    revision: str = "main"

    def path(self, split: str, cache_dir: str) -> Path:
        """The split's file, fetched if need be."""
        repository = hub.Repository(self.repository, "dataset", cache_dir, f"{FLAGS[split]} {self.name}")
        part = "evaluation" if split == "evaluation" else "calibration"
        return hub.fetch_data(repository, self.files[part], self.revision)


def _parquet(text: HubText, column: str) -> Callable[[str, str], Sequence[Row]]:
    def rows(split: str, cache_dir: str) -> list[str]:
        from pyarrow import parquet  # takes a moment to import, and other texts do without

        return parquet.read_table(text.path(split, cache_dir), columns=[column])[column].to_pylist()

    return rows


def _c4(shard: Callable[[str, str], tuple[str, Path]]) -> Corpus:
    """The protocol of c4, from `shard(split, cache_dir)`: whom to name in an error, and a file or folder."""

    def rows(split: str, cache_dir: str) -> Sequence[Row]:
        if split != "evaluation":
            return texts.indexed_rows(*shard(split, cache_dir), PARTS[split])
        return list(itertools.islice(texts.rows(*shard(split, cache_dir), PARTS[split]), C4_EVALUATED))

    return Corpus(rows, evaluation_join=" ", by_document=True, evaluation_windows=C4_WINDOWS)


def _pydoc_rows(split: str, cache_dir: str = "") -> list[str]:
    """The language reference inside every CPython: its topics in alphabetical order, every other one to each part.

    Some topics hold others, or parts of them, so evaluation leaves out every paragraph that calibration has.
    """
    from pydoc_data.topics import topics

    def key(paragraph: str) -> str:
        return " ".join(paragraph.split())

    entries = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    calibration = entries[0::2]
    if split != "evaluation":
        return calibration
    seen = {key(paragraph) for text in calibration for paragraph in text.split("\n\n")}
    return ["\n\n".join(p for p in text.split("\n\n") if key(p) not in seen) for text in entries[1::2]]


def _in_long_document(
    label: str, rows: Sequence[Row], encode: Callable[[Row], Tensor], width: int, rng: random.Random
) -> tuple[int, int, Tensor]:
    """A random window: its document, where in it the window begins, and its tokens."""
    if not len(rows):
        raise RunError(f"{label}: is empty")
    for _ in range(C4_MISSES):
        document = rng.randint(0, len(rows) - 1)
        with texts.read_errors(label):
            row = rows[document]
        found = encode(row)
        if len(found) > width:
            start = rng.randint(0, len(found) - width - 1)
            return document, start, found[start : start + width]
    raise RunError(f"{label}: none of {C4_MISSES} documents drawn is longer than {width} tokens; lower --seqlen")


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
    "c4": _c4(lambda split, cache_dir: (f"{FLAGS[split]} c4", C4.path(split, cache_dir))),
    "wikitext2": Corpus(_parquet(_WIKITEXT2, "text")),
    "ptb": Corpus(_parquet(_PTB, "sentence"), evaluation_join=" "),
    "pydoc": Corpus(_pydoc_rows),
}
