"""What a GPU holds, by the bytes that pretended ones claim, against the formulas of docs/scaling.md."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from pretend_device import pretended_gpus

from lib import PRUNERS, LanguageModel, Pattern, RunError, perplexity, prune_model
from lib.fisher import row_fisher
from lib.memory import is_finite
from lib.pruners import alps
from lib.stats import InputStats
from lib.storage import held_in_save_dtypes, round_to_save_dtypes
from lib.trials import Trials

sys.path.insert(0, str(Path(__file__).parent.parent / "script" / "benchmark"))
from scaling import PRUNING

GPU = torch.device("cuda", 0)
WIDTH, INNER, BLOCKS, VOCABULARY, WINDOWS, SEQLEN = 64, 160, 6, 96, 8, 32


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "ria", "sparsegpt", "alps"])
@pytest.mark.parametrize(("out", "into"), [(256, 512), (512, 512), (1024, 512)])
def test_a_pruner_takes_what_the_formula_says(pruner, out, into, monkeypatch):
    monkeypatch.setattr(alps, "MOST", 3 * alps.EVERY)
    a_weight, a_square = PRUNING[pruner]
    with pretended_gpus() as gpus:
        stats = InputStats("gram")
        stats.add(torch.randn(1100, into, device="cuda"))
        stats.finish()
        weight = torch.randn(out, into, device="cuda").half()
        gpus.start_counting()
        before = gpus.live[GPU]
        PRUNERS[pruner].prune(weight, stats, 0.5, Pattern())
        taken = gpus.peak[GPU] - before
    formula = a_weight * out * into + a_square * into**2
    assert 0.5 * formula < taken < 1.1 * formula


def run_prune(name: str):
    def run(model: LanguageModel, tokens: torch.Tensor) -> None:
        prune_model(model, PRUNERS[name], {m.name: 0.5 for m in model.matrices}, Pattern(), tokens, batch_size=1)

    return run


def run_search(model: LanguageModel, tokens: torch.Tensor) -> None:
    def prune(goals, asymmetry, windows, **more) -> None:
        prune_model(model, PRUNERS["magnitude"], goals, Pattern(), windows, asymmetry=asymmetry, **more)

    Trials(model, prune, tokens, tokens[:2], 1).attribute_loss(0.5, 0.0, None)


A_BLOCK = 4 * WIDTH**2 + 3 * WIDTH * INNER
HIDDEN = 4 * SEQLEN * WIDTH  # bytes of a window's hidden state
# What a forward pass of one window holds at most at once: a few of a block's inner tensors; where gradients are wanted
# all of them, and the logits with what the loss makes of them.
FORWARD = 4 * SEQLEN * (5 * WIDTH + 3 * INNER)
WITH_GRADIENTS = 4 * SEQLEN * (16 * WIDTH + 6 * INNER + 4 * SEQLEN) + 5 * 4 * SEQLEN * VOCABULARY
GRADIENTS = 2 * WITH_GRADIENTS + BLOCKS * HIDDEN + 4 * 4 * WIDTH * INNER


@pytest.mark.parametrize(
    ("what", "formula"),
    [
        (lambda model, tokens: perplexity(model, tokens), FORWARD),
        (run_prune("magnitude"), PRUNING["magnitude"][0] * WIDTH * INNER),
        (run_prune("wanda"), PRUNING["wanda"][0] * WIDTH * INNER + WINDOWS * HIDDEN + FORWARD),
        (lambda model, tokens: row_fisher(model, tokens), GRADIENTS),
        (run_search, 4 * BLOCKS * A_BLOCK + GRADIENTS),
    ],
    ids=["perplexity", "magnitude", "wanda", "fisher", "search"],
)
def test_a_stage_takes_what_the_formula_says(what, formula):
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQLEN, tie_word_embeddings=False,
    )  # fmt: skip
    with pretended_gpus() as gpus:
        model = LanguageModel(transformers.LlamaForCausalLM(config).to("cuda"))
        held = 4 * (2 * VOCABULARY * WIDTH + BLOCKS * A_BLOCK)
        assert held <= gpus.live[GPU] < 1.01 * held  # and the norms
        gpus.start_counting()
        before = gpus.live[GPU]
        what(model, torch.randint(0, VOCABULARY, (WINDOWS, SEQLEN)))
        taken = gpus.peak[GPU] - before
    assert 0.4 * formula < taken < 1.1 * formula


def test_a_factor_that_fails_ends_alps_in_one_line(monkeypatch):
    stats = InputStats("gram")
    with pretended_gpus():
        stats.add(torch.randn(30, 16, device="cuda"))
        stats.finish()
        whole = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (whole(gram)[0], torch.ones_like(whole(gram)[1])))
        with pytest.raises((RunError, torch.linalg.LinAlgError), match="Cholesky"):
            PRUNERS["alps"].prune(torch.randn(8, 16, device="cuda"), stats, 0.5, Pattern())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    tensor = torch.randn(5, 70).to(dtype)
    assert is_finite(tensor)
    tensor[3, 41] = value
    assert not is_finite(tensor)
    assert is_finite(tensor[:0])


def test_what_is_settled_is_the_same_after_it_was_held_as_saved():
    model = torch.nn.Linear(70, 50)
    save_dtypes = {"weight": torch.bfloat16, "bias": torch.float32}
    assert not list(round_to_save_dtypes(model.state_dict(), save_dtypes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with held_in_save_dtypes(model, save_dtypes):
        assert (model.weight.dtype, model.bias.dtype) == (torch.bfloat16, torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(before["weight"], before["weight"].bfloat16().float())
