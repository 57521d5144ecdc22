"""Gradients of a model that is read block by block, and what is made of them: the same numbers as in memory."""

import pytest
import torch
from test_bad_input import make_texts, save_tokenizer
from test_handed_on import HERE, family
from test_stream import config_of
from tiny import ARCHITECTURES, tiny_model, tiny_tokens

import main
from lib import PRUNERS, Pattern, RunConfig, RunError, evaluator, find_source, prune_model
from lib.activations import Store
from lib.fisher import row_fisher
from lib.gradients import for_each_gradient
from lib.load import load_model, open_model
from lib.plan import plan
from lib.trials import Trials

FAMILIES = [*ARCHITECTURES, *HERE]


def both(name: str, folder, dtype: str = "auto"):
    """A model in memory and the same one streamed."""
    hf = family(name) if name in HERE else tiny_model(name)
    hf.save_pretrained(folder / "model", max_shard_size="20KB")
    source = find_source(str(folder / "model"))
    streamed = open_model(source, "cpu", dtype)
    streamed.load_non_blocks()
    return load_model(source, "cpu", dtype), streamed


def gradients_of(model, tokens, batch_size, store=None) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for_each_gradient(
        model, tokens, lambda matrix, gradient: found.setdefault(matrix.name, []).append(gradient.clone()),
        batch_size=batch_size, store=store,
    )  # fmt: skip
    return found


@pytest.mark.usefixtures("exact_gradients")
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_gradients_are_those_in_memory(name, tmp_path):
    whole, streamed = both(name, tmp_path)
    tokens = tiny_tokens(5)  # the last batch is smaller than the others
    if name == "dory" or any(len({use.block for use in m.uses}) > 1 for m in whole.matrices):
        with pytest.raises(RunError, match=r"--stream: .* is used more than once .* leave out --stream"):
            gradients_of(streamed, tokens, 2)
        return
    found = gradients_of(streamed, tokens, 2, Store(tmp_path, limit=0))
    expected = gradients_of(whole, tokens, 2)
    assert found.keys() == expected.keys()
    for matrix, gradients in expected.items():
        assert len(found[matrix]) == len(gradients)
        for one, other in zip(found[matrix], gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert all(p.is_meta or not p.requires_grad for p in streamed.model.parameters())


# dbrx bears no mixed precision; of bert and opt_350m several matrices read what a block is given as it is.
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "dbrx", "bert", "opt_350m", "gemma3n_text"])
def test_they_are_the_same_to_the_bit_in_mixed_precision(name, tmp_path):
    whole, streamed = both(name, tmp_path)
    tokens = tiny_tokens(5)
    found = gradients_of(streamed, tokens, 2, Store(tmp_path, limit=0))
    for matrix, gradients in gradients_of(whole, tokens, 2).items():
        assert all(torch.equal(one, other) for one, other in zip(found[matrix], gradients, strict=True)), matrix


@pytest.mark.parametrize("name", ["llama", "mixtral"])  # of the second, tensors of the files are put together
def test_those_of_a_model_in_float16_are_taken_too(name, tmp_path):
    whole, streamed = both(name, tmp_path, "float16")
    tokens = tiny_tokens(4)
    found = gradients_of(streamed, tokens, 2)
    for matrix, gradients in gradients_of(whole, tokens, 2).items():
        assert all(torch.equal(one, other) for one, other in zip(found[matrix], gradients, strict=True)), matrix


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fisher_and_trials_of_a_streamed_model_are_those_in_memory(name, tmp_path):
    whole, streamed = both(name, tmp_path)
    tokens, results = tiny_tokens(8), []
    for model, store in ((whole, None), (streamed, Store(tmp_path, limit=0))):

        def prune(targets, _asymmetry, windows, commit, model=model, store=store):
            prune_model(model, PRUNERS["wanda"], targets, Pattern(), windows, batch_size=2, commit=commit, store=store)

        rows = row_fisher(model, tokens, store)
        trials = Trials(model, prune, tokens, tiny_tokens(3, seed=2), 2, store)
        parts, found = trials.attribute_loss(0.5, 0.0, None)
        uneven = {m.name: 0.3 + 0.2 * (m.block % 2) for m in model.matrices}
        tried = [one["perplexity"] for one in trials.grid_search("epsilon", {0.2: (uneven, 0.0)})["tried"]]
        with model.resident_block(0):  # everything is put back
            weights = [m.weight.clone() for m in model.matrices_of(0)]
        results.append((rows, parts, found["uniform"], tried, weights))
    (rows, parts, uniform, tried, weights), (rows2, parts2, uniform2, tried2, weights2) = results
    assert rows.keys() == rows2.keys()
    assert all(torch.equal(rows[key], rows2[key]) for key in rows)
    assert parts == parts2
    assert (uniform, tried) == (uniform2, tried2)
    assert all(map(torch.equal, weights, weights2))


@pytest.mark.parametrize(("method", "options"), [("alps_search", {}), ("sparsegpt_owl", {"owl_lambda": "auto"})])
def test_a_streamed_run_plans_what_one_in_memory_does(method, options, tmp_path):
    models, tokens, held_out = both("llama", tmp_path), tiny_tokens(8), tiny_tokens(4, seed=5)
    planned = []
    for model, store in zip(models, (None, Store(tmp_path, limit=0)), strict=True):
        config = config_of(tmp_path, prune_method=method, nsamples=8, **options)
        planned.append(plan(config, model, {}, tokens, held_out, batch_size=2, store=store))
    assert planned[0]["targets"] == planned[1]["targets"]
    assert len(set(planned[0]["targets"].values())) > 1 or options
    kinds = [[(s["parameter"], s.get("chosen")) for s in one["searches"]] for one in planned]
    assert kinds[0] == kinds[1]


def test_a_shared_matrix_is_refused_before_any_work(tmp_path, monkeypatch):
    tiny_model("zamba").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    make_texts(tmp_path)
    monkeypatch.setattr(evaluator, "perplexity", lambda *_, **__: pytest.fail("the work has begun"))
    config = run_config(tmp_path, prune_method="wanda_search", sparsity_ratio=0.5, stream=True)
    with pytest.raises(RunError, match=r"--stream: .*shared_transf.* is used more than once .* leave out --stream"):
        main.run(config)


def test_what_no_pruner_reads_is_not_measured(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    make_texts(tmp_path)
    monkeypatch.setattr(main, "row_fisher", lambda *_: pytest.fail("2:4 reads no Fisher information"))
    record = main.run(run_config(tmp_path, prune_method="sparsegpt", sparsity_type="2:4", fisher=0.5))
    assert "without effect on this run: --fisher" in [event["message"] for event in record["events"]]


def run_config(folder, **options) -> RunConfig:
    text = str(folder / "words.txt")
    return RunConfig(
        model=str(folder / "model"), calib_data=text, eval_data=text, seqlen=16, nsamples=4, eval_windows=2,
        device="cpu", eval_dense=True, save=str(folder / "results"), save_model=str(folder / "pruned"),
        cache_dir=str(folder / "cache"), **options,
    )  # fmt: skip


def test_gradients_on_the_way_back_are_held_for_one_block(tmp_path, monkeypatch):
    """Beside what every block gives, by the formula of docs/scaling.md: L + 1 hidden states, and 2 on the way back."""
    tiny_model("llama", num_hidden_layers=8).save_pretrained(tmp_path / "model")
    model = open_model(find_source(str(tmp_path / "model")), "cpu")
    model.load_non_blocks()
    store, most, reserve = Store(tmp_path, limit=10**9), [], Store.reserve

    def watched(self, size: int, owner: object) -> None:
        reserve(self, size, owner)
        most.append(self.held)

    monkeypatch.setattr(Store, "reserve", watched)
    gradients_of(model, tiny_tokens(8), 2, store)
    assert max(most) <= (8 + 1 + 2) * 8 * 24 * 32 * 4
    assert store.held == 0


def test_what_memory_a_store_gives_it_counts(tmp_path):
    store = Store(tmp_path, limit=100)
    first = store.copy(torch.arange(10, dtype=torch.float32))
    second = store.copy(torch.arange(20, dtype=torch.float32))  # past the limit: in a file
    assert store.held == 40
    assert second.tolist() == list(range(20))
    del first
    assert store.held == 0
    assert store.fits(100)
    assert not store.fits(101)
