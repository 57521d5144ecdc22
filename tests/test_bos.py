"""Whether a model needs BOS in front of every window: what a run compares, says and records."""

import pytest
import torch
import transformers
from pieces import TEXT, model_folder, text_of, train

import main
from lib import LanguageModel, RunConfig, find_source, load_tokenizer, open_model, results
from lib.evaluate import bos_effect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama on whose tokens BOS has a great effect, with a sentencepiece tokenizer."""
    folder = model_folder(tmp_path_factory.mktemp("bos") / "llama", train())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(text_of(300))
    return folder


def losses(model, text: torch.Tensor) -> tuple[float, float]:
    """With BOS and without, of transformers' own logits on the tokens that both predict."""

    def mean(window: torch.Tensor, skipped: int, text: torch.Tensor) -> float:
        logits = model(window[None], use_cache=False).logits[0, skipped:-1].double()
        return float(torch.nn.functional.cross_entropy(logits, window[1 + skipped :]))

    with torch.no_grad():
        return mean(torch.tensor([1, *text[:-1]]), 1, text), mean(text[:-1], 0, text)


@pytest.mark.parametrize("begins", [True, False])
def test_the_effect_is_of_the_same_tokens_in_memory_and_streamed(begins, folder):
    source = find_source(str(folder))
    hf = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    text = torch.randint(3, 400, (20,), generator=torch.Generator().manual_seed(5))
    expected = losses(hf, text)
    window = torch.tensor([1, *text]) if begins else text
    streamed = open_model(source, "cpu", "float32")
    streamed.load_non_blocks()
    for model in (LanguageModel(hf), streamed):
        found = bos_effect(model, window, 1)
        assert (found["loss_with_bos"], found["loss_without_bos"]) == pytest.approx(expected, rel=1e-5)


def run(folder, out, **options):
    config = RunConfig(
        model=str(folder), prune_method="wanda", sparsity_ratio=0.5, device="cpu", seqlen=16, nsamples=2, quiet=True,
        calib_data=f"{folder.parent}/text.txt", eval_data=f"{folder.parent}/text.txt", save=str(out / "results"),
        cache_dir=str(out / "cache"), **options,
    )  # fmt: skip
    return main.run(config)


def windows_that(folder, helps: bool) -> tuple[int, tuple[float, float]]:
    """How many evaluation windows to take so that BOS helps on the last, or does not; and its losses."""
    tokenizer = load_tokenizer(find_source(str(folder)))
    ids = torch.tensor(tokenizer((folder.parent / "text.txt").read_text()).input_ids)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    for count in range(2, len(ids) // 16 + 1):
        begun, bare = losses(model, ids[16 * count - 16 : 16 * count])
        if (begun < 0.88 * bare) if helps else (begun > 0.92 * bare):
            return count, (begun, bare)
    raise AssertionError("no such window")


@pytest.mark.parametrize("helps", [True, False])
def test_a_run_says_where_bos_helps(helps, folder, tmp_path):
    count, expected = windows_that(folder, helps)
    for name, options in (("memory", {}), ("stream", {"stream": True, "save_model": str(tmp_path / "pruned")})):
        record = run(folder, tmp_path / name, eval_windows=count, **options)
        bos = record["model"]["bos"]
        assert (bos["loss_with_bos"], bos["loss_without_bos"]) == pytest.approx(expected, rel=1e-4)
        assert bos["helps"] is helps
        for said in (results.summary(record), *[e["message"] for e in record["events"]]) if helps else ():
            assert "--add_bos every" in said
        assert ("--add_bos every" in results.summary(record)) is helps
        assert any("--add_bos every" in event["message"] for event in record["events"]) is helps


def test_with_bos_in_every_window_nothing_is_compared(folder, tmp_path):
    record = run(folder, tmp_path, add_bos="every", eval_windows=3)
    assert record["config"]["add_bos"] == "every"
    assert "bos" not in record["model"]
    assert "bos_every" in record["run"]
    assert not record["events"]


def test_where_a_tokenizer_has_no_bos_nothing_is_compared(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    for path in folder.iterdir():
        if path.name != "tokenizer.model":
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text.txt").write_text(text_of(300))
    words = {word: i for i, word in enumerate(TEXT.split())}
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(words, unk_token="the"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "bare")
    assert run(tmp_path / "bare", tmp_path)["model"]["bos"] is None
