"""The model's own text: its distribution, its series, and its cache."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_bad_input import save_tokenizer
from tiny import tiny_model
from toy import Block, Toy

from lib import LanguageModel, RunConfig, RunError, ranks, sampling
from lib import windows as lib_windows
from lib.load import find_source, load_model, load_tokenizer


@pytest.fixture
def model(monkeypatch):
    """Of which four windows are sampled at a time; its own configuration would end every text and favour one token."""
    monkeypatch.setattr(sampling, "AT_ONCE", 48)
    hf = tiny_model("llama")
    hf.generation_config.eos_token_id, hf.generation_config.top_k = list(range(96)), 1
    return LanguageModel(hf)


def test_tokens_follow_the_models_distribution(monkeypatch):
    """Second tokens of many short windows against the probabilities that the model gives, each beside its first."""
    monkeypatch.setattr(sampling, "AT_ONCE", 60_000)
    model = LanguageModel(tiny_model("llama", vocab_size=5))
    found = sampling.sample_windows(model, 20_000, seqlen=2)
    with torch.no_grad():
        expected = model.model(torch.arange(5)[:, None]).logits[:, 0].softmax(-1)
    assert torch.bincount(found[:, 0]).min() > 3000
    for first in range(5):
        followers = found[found[:, 0] == first, 1]
        shares = torch.bincount(followers, minlength=5) / len(followers)
        assert float((shares - expected[first]).abs().max()) < 0.03  # four standard deviations


def test_a_series_by_seed(model):
    whole = sampling.sample_windows(model, 11, seqlen=12, seed=3)
    assert whole.shape == (12, 12)
    assert torch.equal(whole[:4], sampling.sample_windows(model, 2, seqlen=12, seed=3))
    assert torch.equal(sampling.sample_windows(model, 9, seqlen=12, seed=3, known=whole[:4]), whole)
    assert not torch.equal(whole, sampling.sample_windows(model, 11, seqlen=12, seed=4))
    assert len(set(map(tuple, whole.tolist()))) == 12
    assert model.model.generation_config.top_k == 1


def test_attention_that_plans_for_each_length_is_left_out(model):
    seen = set()
    model.model.register_forward_pre_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    sampling.sample_windows(model, 4, seqlen=12)
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_ranks_write_one_series(model, monkeypatch):
    alone = sampling.sample_windows(model, 12, seqlen=12)
    shares = []
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            ranks, "all_gather", lambda mine: shares.append(mine) or [[(b, alone[:4]) for b in range(3)]]
        )
        sampling.sample_windows(model, 12, seqlen=12)
    written = dict(pair for share in shares for pair in share)
    assert [len(share) for share in shares] == [2, 1]
    assert torch.equal(torch.cat([written[batch] for batch in range(3)]), alone)


def test_what_a_window_begins_with(model, monkeypatch):
    model.tokenizer = SimpleNamespace()
    monkeypatch.setattr(sampling.tokens, "prefix", lambda _: [1])
    monkeypatch.setattr(sampling.tokens, "bos", lambda _: 7)
    assert sampling.sample_windows(model, 4, seqlen=12)[:, 0].tolist() == [1] * 4
    assert sampling.sample_windows(model, 4, seqlen=12, add_bos="every")[:, 0].tolist() == [7] * 4
    monkeypatch.setattr(sampling.tokens, "bos", lambda _: None)
    with pytest.raises(RunError, match="--add_bos every"):
        sampling.sample_windows(model, 4, seqlen=12, add_bos="every")


def test_a_model_that_cannot_generate():
    with pytest.raises(RunError, match=r"^Toy cannot sample a text"):
        sampling.sample_windows(LanguageModel(Toy([Block()])), 1, seqlen=4)


def test_logits_without_a_distribution(model):
    with torch.no_grad():
        model.model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunError, match=r"cannot sample a text \(its logits hold NaN or infinity\)"):
        sampling.sample_windows(model, 1, seqlen=4)


def test_the_cache_grows_and_is_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "AT_ONCE", 48)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    source = find_source(str(tmp_path / "model"))
    model = load_model(source, "cpu", tokenizer=load_tokenizer(source))

    def drawn(**changed) -> lib_windows.Windows:
        flags = {
            "model": str(tmp_path / "model"), "prune_method": "wanda_search", "sparsity_ratio": 0.5, "nsamples": 4,
            "calib_data": "self", "eval_data": "pydoc", "cache_dir": str(tmp_path / "cache"), "device": "cpu",
        }  # fmt: skip
        config = RunConfig(**{**flags, **changed})
        return lib_windows.with_sampled_windows(
            config, lib_windows.corpus_windows(config, model.tokenizer, 12), model, 12
        )

    first = drawn()
    assert [len(part) for part in (first.calibration, first.held_out, first.recovery)] == [4, 2, 4]
    (path,) = (tmp_path / "cache" / "sampled_text").iterdir()
    assert len(json.loads(path.read_text())["windows"]) == 8
    calls, write = [], sampling.sample_windows
    monkeypatch.setattr(
        lib_windows, "sample_windows", lambda *args, **more: calls.append(more["known"]) or write(*args, **more)
    )
    again = drawn(prune_method="wanda_search", recover=("model",), recover_nsamples=6)
    assert torch.equal(again.calibration, first.calibration)
    assert torch.equal(again.recovery[:4], first.calibration)
    assert not calls
    series = torch.cat([first.calibration, first.held_out])
    corpus = drawn(calib_data="pydoc")
    options = {"calib_data": "pydoc", "recover": ("model",), "recover_nsamples": 5}
    beside = drawn(**options, recover_self=5)
    assert torch.equal(beside.recovery[beside.own], series[:5])
    assert torch.equal(beside.calibration, corpus.calibration)
    mixed = drawn(**options, calib_self=2, recover_self=3)  # of the series 2, then 1 that is held out, then 1
    assert torch.equal(mixed.calibration, torch.cat([corpus.calibration, series[:2]])[[0, 4, 1, 2, 5, 3]])
    assert torch.equal(mixed.held_out, torch.cat([corpus.held_out[:1], series[2:3], corpus.held_out[1:]]))
    assert torch.equal(mixed.recovery[:6], mixed.calibration)
    assert torch.equal(mixed.recovery[-1], series[3])
    assert mixed.own.tolist() == [False, True, False, False, True, False, False, True]
    assert mixed.label_shares(0.25).tolist() == [0.25, 0, 0.25, 0.25, 0, 0.25, 0.25, 0]
    assert not calls
    more = drawn(recover=("model",), recover_nsamples=10)
    assert torch.equal(more.held_out, first.held_out)
    assert len(calls) == 1
    assert len(more.recovery) == 10
    assert not torch.equal(drawn(seed=1).calibration, first.calibration)
    path.write_text("{")
    with pytest.raises(RunError, match=r"--cache_dir .* is not a model's text"):
        drawn()
