import json
import random

import pytest
import torch

from lib import RunError, calibration_windows, data, evaluation_windows


def ids(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids[0]


@pytest.fixture
def rows(tmp_path):
    """The same rows in every format that is accepted."""
    from datasets import Dataset

    texts = [f"row {i} " + "x" * i for i in range(30)]
    table = Dataset.from_dict({"text": texts})
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in texts]))
    return texts, [tmp_path / name for name in ("saved", "rows.parquet", "rows.jsonl", "rows.json")]


def test_rows_join_with_a_space_to_calibrate_and_two_newlines_to_evaluate(tokenizer, rows):
    texts, paths = rows
    whole = ids(tokenizer, "\n\n".join(texts))
    joined = ids(tokenizer, " ".join(texts))
    random.seed(7)  # the published protocol: Python's own generator
    starts = [random.randint(0, len(joined) - 10 - 1) for _ in range(5)]
    for path in paths:
        windows = evaluation_windows(str(path), tokenizer, seqlen=10)
        assert windows.shape == (len(whole) // 10, 10)
        assert torch.equal(windows.flatten(), whole[: len(whole) // 10 * 10])
        found = calibration_windows(str(path), tokenizer, nsamples=5, seqlen=10, seed=7)
        assert torch.equal(found, torch.stack([joined[s : s + 10] for s in starts]))


def test_windows_held_out_follow_and_share_no_token(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 400))))  # no character twice
    plain = calibration_windows(str(path), tokenizer, nsamples=8, seqlen=30, seed=3)
    both = calibration_windows(str(path), tokenizer, nsamples=8, seqlen=30, seed=3, held_out=4)
    assert both.shape == (12, 30)
    assert torch.equal(both[:8], plain)
    starts = [joined_at(ids(tokenizer, path.read_text()), window) for window in both]
    for i in range(8, 12):
        assert all(abs(starts[i] - start) >= 30 for start in starts[:i])
    with pytest.raises(RunError, match="no room for 60 windows apart from the 8"):
        calibration_windows(str(path), tokenizer, nsamples=8, seqlen=30, seed=3, held_out=60)


def test_further_windows_are_new_where_there_is_room(tokenizer, tmp_path, caplog):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 400))))  # no character twice
    settings = {"nsamples": 3, "seqlen": 30, "seed": 3, "held_out": 2}
    plain = calibration_windows(str(path), tokenizer, **settings)
    starts = {}
    for further in (3, 40):
        found = calibration_windows(str(path), tokenizer, **settings, recovery=further)
        assert found.shape == (5 + further, 30)
        assert torch.equal(found[:5], plain)
        starts[further] = [joined_at(ids(tokenizer, path.read_text()), window) for window in found]
        for i in range(5, 5 + further):
            assert all(abs(starts[further][i] - start) >= 30 for start in starts[further][3:5])
    assert all(abs(starts[3][i] - other) >= 30 for i in range(5, 8) for other in starts[3][:i])
    assert starts[40][:8] == starts[3]
    assert "of the windows that recovery trains on overlap others" in caplog.text


def joined_at(tokens: torch.Tensor, window: torch.Tensor) -> int:
    return next(i for i in range(len(tokens)) if torch.equal(tokens[i : i + len(window)], window))


def test_a_txt_is_used_verbatim(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\nthree  four")
    assert torch.equal(
        evaluation_windows(str(path), tokenizer, seqlen=20)[0], ids(tokenizer, "one\ntwo\n\nthree  four")[:20]
    )


def test_windows_can_be_limited_but_not_invented(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 95)
    assert evaluation_windows(str(path), tokenizer, seqlen=10, limit=4).shape == (4, 10)
    with pytest.raises(RunError, match=r"--eval_windows 10: .* only 9 windows"):
        evaluation_windows(str(path), tokenizer, seqlen=10, limit=10)
    with pytest.raises(RunError, match="--eval_data"):
        evaluation_windows(str(path), tokenizer, seqlen=96)
    with pytest.raises(RunError, match="--calib_data"):
        calibration_windows(str(path), tokenizer, nsamples=1, seqlen=95, seed=0)


def test_pydoc_parts_share_no_paragraph(tokenizer):
    def paragraphs(part: str) -> set[str]:
        return {" ".join(p.split()) for text in data.CORPORA["pydoc"].rows(part) for p in text.split("\n\n")} - {""}

    assert not paragraphs("calibration") & paragraphs("evaluation")
    assert min(len(paragraphs("calibration")), len(paragraphs("evaluation"))) > 1000
    assert len(evaluation_windows("pydoc", tokenizer, seqlen=512)) > 100


def test_c4_cuts_each_window_from_a_document_longer_than_it(tokenizer, monkeypatch):
    documents = ["short", "a" * 50, "b" * 80, "tiny"]
    corpus = data.Corpus(lambda split, cache_dir: documents, by_document=True)
    monkeypatch.setitem(data.CORPORA, "c4", corpus)
    windows = calibration_windows("c4", tokenizer, nsamples=20, seqlen=40, seed=0)
    first_of = {text: ids(tokenizer, text)[:40].tolist() for text in documents}
    assert {tuple(window) for window in windows.tolist()} == {tuple(first_of[text]) for text in documents[1:3]}
    random.seed(0)
    chosen = next(text for text in iter(lambda: documents[random.randint(0, 3)], None) if len(text) > 40)
    assert windows[0].tolist() == first_of[chosen]
    monkeypatch.setattr(data, "C4_MISSES", 50)
    with pytest.raises(RunError, match="longer than 100 tokens"):
        calibration_windows("c4", tokenizer, nsamples=1, seqlen=100, seed=0)
