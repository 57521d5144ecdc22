"""What one block hands to the next, however it does, and blocks and modules that are used more than once."""

from collections import UserDict

import pytest
import torch
import transformers
from test_architectures import targets_of
from tiny import tiny_tokens
from torch import Tensor, nn
from toy import Block, Toy, in_turn

from lib import PRUNERS, LanguageModel, Pattern, RunError, precision, prune_model, sparsity_by_matrix
from lib.activations import Store
from lib.blockwise import BlockwisePass
from lib.fisher import row_fisher
from lib.sequential import walk


def pick(hidden: Tensor) -> Tensor:
    """The most active tokens of each window, as an index would give them, (B, S // 2)."""
    return hidden.abs().sum(-1).topk(hidden.shape[1] // 2).indices


def chosen(hidden: Tensor, indices: Tensor | None) -> Tensor:
    """Hidden states, the chosen ones doubled."""
    if indices is None:
        return hidden
    return hidden * (1 + torch.zeros(hidden.shape[:2]).scatter(1, indices, 1)[..., None])


def toy_of_indices(layers: int = 3) -> Toy:
    """Block 0 chooses tokens; all others are given its choice, by the block before them."""

    def form(hidden, indices=None):
        return chosen(hidden, indices), pick(hidden) if indices is None else indices

    def walk(blocks, hidden, _tokens):
        indices = None
        for block in blocks:
            hidden, indices = block(hidden, indices=indices)
        return hidden

    return Toy([Block(form) for _ in range(layers)], walk)


def toy_of_first() -> Toy:
    """Block 0's second output is kept by the model and given to the last block alone."""

    def form(hidden, first=None):
        return [hidden if first is None else hidden * first, hidden.sigmoid()]

    def walk(blocks, hidden, _tokens):
        hidden, first = blocks[0](hidden)
        hidden, _ = blocks[1](hidden)
        return blocks[2](hidden, first=first)[0]

    return Toy([Block(form) for _ in range(3)], walk)


def toy_of_residual() -> Toy:
    """Blocks hand on the stream that they are to be added to beside what they add, which the model adds up."""

    def form(hidden, residual):
        return hidden - residual, residual

    def walk(blocks, hidden, _tokens):
        residual = hidden
        for block in blocks:
            added, residual = block(hidden, residual=residual)
            residual = residual + added
            hidden = residual / 2
        return hidden

    return Toy([Block(form) for _ in range(3)], walk)


def toy_of_shared_dict(make) -> Toy:
    """Block 0 puts its state into a container that all blocks are called with."""

    def form(hidden, states):
        if "first" not in states:
            states["first"] = hidden.tanh()
        return hidden + states["first"]

    def walk(blocks, hidden, _tokens):
        states = make()
        for block in blocks:
            hidden = block(hidden, states=states)
        return hidden

    return Toy([Block(form) for _ in range(3)], walk)


def toy_of_list() -> Toy:
    """Blocks append to a list and read all of it."""

    def form(hidden, states):
        states.append(hidden.mean(-1, keepdim=True))
        return hidden + sum(states)

    def walk(blocks, hidden, _tokens):
        states = []
        for block in blocks:
            hidden = block(hidden, states=states)
        return hidden

    return Toy([Block(form) for _ in range(3)], walk)


def toy_of_skip() -> Toy:
    """The model adds the first block's output before the last, and writes into it."""

    def walk(blocks, hidden, _tokens):
        first = blocks[0](hidden)
        hidden = blocks[1](first * 0.5)
        hidden += first
        return blocks[2](hidden) + first

    return Toy([Block() for _ in range(3)], walk)


def toy_of_arguments() -> Toy:
    """Every block is given an embedding of its own, made from the tokens."""

    def walk(blocks, hidden, tokens):
        for index, block in enumerate(blocks):
            hidden = block(hidden, scale=(tokens % (index + 2))[..., None].float())
        return hidden

    return Toy([Block(lambda hidden, scale: hidden * (1 + scale)) for _ in range(3)], walk)


def toy_in_place(copies: bool = False) -> Toy:
    """Blocks write into what they are called with, or into a copy."""

    class InPlace(Block):
        def forward(self, hidden):
            hidden = hidden + self.inner(hidden) if copies else hidden.add_(self.inner(hidden))
            return hidden * 0.9

    return Toy([InPlace() for _ in range(3)])


def toy_of_loop() -> Toy:
    """One block after the first is called three times, another ends; the model works between them."""

    def walk(blocks, hidden, _tokens):
        start = hidden = blocks[0](hidden)
        for _ in range(3):
            hidden = blocks[1](hidden.tanh() + start)
        return blocks[2](hidden)

    return Toy([Block() for _ in range(3)], walk)


def toy_of_shared_module() -> Toy:
    """Blocks 0 and 2 are two modules with one inside them."""
    shared = Block().inner
    return Toy([Block(inner=shared), Block(), Block(inner=shared), Block()])


def toy_of_attention(keep: str) -> Toy:
    """Blocks give (S, S) weights that nobody reads beside their hidden state."""
    forms = {
        "tuple": lambda hidden: (hidden, hidden @ hidden.mT),
        "list": lambda hidden: [hidden, None, hidden @ hidden.mT],
        "alone": lambda hidden: [hidden],
    }
    return Toy([Block(forms[keep]) for _ in range(3)])


TOYS = {
    "plain": lambda: Toy([Block() for _ in range(3)]),
    "tuple": lambda: toy_of_attention("tuple"),
    "list": lambda: toy_of_attention("list"),
    "list of one": lambda: toy_of_attention("alone"),
    "arguments": toy_of_arguments,
    "in place": toy_in_place,
    "shared module": toy_of_shared_module,
    "indices": toy_of_indices,
    "first": toy_of_first,
    "residual": toy_of_residual,
    "dict": lambda: toy_of_shared_dict(dict),
    "user dict": lambda: toy_of_shared_dict(UserDict),
    "states": toy_of_list,
    "skip": toy_of_skip,
    "loop": toy_of_loop,
}
PLAIN = ("plain", "tuple", "list", "list of one", "arguments", "in place", "shared module")


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("toy", TOYS)
def test_streams_give_what_the_models_own_forward_gives(toy, stored, tmp_path):
    model = LanguageModel(TOYS[toy]())
    for windows, seqlen, batch_size in ((5, 24, 2), (3, 9, 3)):
        tokens = tiny_tokens(windows, seqlen, seed=windows)
        blockwise = BlockwisePass(model, tokens, batch_size, Store(tmp_path, 0) if stored else None)
        assert blockwise.route.plain == (toy in PLAIN)
        for visit in range(len(blockwise.visits)):
            again = [blockwise.output(visit, batch) for batch in range(len(blockwise))]
            blockwise.advance(visit)
            assert all(torch.equal(one, other) for one, other in zip(again, blockwise.hidden, strict=True))
        for read, last in blockwise.outputs():
            assert torch.equal(last, model.hidden_states(read))


def test_what_nobody_reads_is_not_kept():
    model = LanguageModel(toy_of_attention("tuple"))
    blockwise = BlockwisePass(model, tiny_tokens(), 2)
    for visit in range(3):
        blockwise.advance(visit)
        assert [held.same_layout(torch.empty(1, 24, 16)) for held in blockwise._held.values()][-1:] == [True]
        assert len({id(held) for held in blockwise._held.values()}) == 1


def test_what_is_read_no_more_gives_its_place():
    blockwise = BlockwisePass(LanguageModel(toy_of_indices(6)), tiny_tokens(), 2)
    for visit in range(6):
        blockwise.advance(visit)
        assert len({id(held) for held in blockwise._held.values()}) <= 2  # hidden states, and the one choice of tokens


def sums_by_hook(toy: Toy, tokens: Tensor) -> dict[nn.Module, tuple[int, Tensor]]:
    """Of each linear map in the blocks, over all its calls in a plain forward pass: tokens, and X^T X in float64."""
    sums, hooks = {}, []
    for module in toy.model.layers.modules():
        if isinstance(module, nn.Linear):

            def hook(module, args):
                x = args[0].flatten(0, -2).double()
                count, gram = sums.get(module, (0, 0))
                sums[module] = count + len(x), gram + x.T @ x

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        toy(tokens)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("toy", TOYS)
def test_statistics_are_those_of_all_uses(toy):
    model, tokens = LanguageModel(TOYS[toy]()), tiny_tokens()
    expected, found = sums_by_hook(model.model, tokens), {}
    for step in walk(model, tokens, "gram", batch_size=4):
        for matrix in step.matrices:
            assert matrix.name not in found
            found[matrix.name] = step.stats[matrix.name]
            count, gram = expected[matrix.module]
            assert found[matrix.name].tokens == count
            torch.testing.assert_close(found[matrix.name].gram.double(), gram, rtol=1e-4, atol=1e-3)
    assert len(found) == len(expected) == len(model.matrices)


@pytest.mark.parametrize("more", [{}, {"asymmetry": 0.5, "recovery": True}], ids=["alone", "beside"])
@pytest.mark.parametrize("toy", TOYS)
def test_every_matrix_is_pruned_once_to_its_target(toy, more):
    model = LanguageModel(TOYS[toy]())
    targets = targets_of(model)
    assert model.coverage < 1
    prune_model(model, PRUNERS["sparsegpt"], targets, Pattern(), tiny_tokens(), batch_size=4, **more)
    for name, sparsity in sparsity_by_matrix(model).items():
        size = next(m.size for m in model.matrices if m.name == name)
        assert abs(sparsity - targets[name]) <= 0.51 / size, name


def test_what_blocks_write_into_is_trained_as_if_they_did_not(monkeypatch):
    """In float32 autograd refuses to take such gradients; in mixed precision each product reads a copy."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    found, expected = (LanguageModel(toy_in_place(copies)) for copies in (False, True))
    before = [matrix.weight.clone() for matrix in found.matrices]
    for model in (found, expected):
        prune_model(model, PRUNERS["wanda"], targets_of(model), Pattern(), tiny_tokens(), batch_size=4, recovery=True)
    for one, other, was in zip(found.matrices, expected.matrices, before, strict=True):
        torch.testing.assert_close(one.weight, other.weight)
        assert not torch.equal(one.weight, was.masked_fill(one.weight == 0, 0))  # it is trained


@pytest.mark.parametrize("streamed", [False, True])
def test_what_blocks_write_into_has_no_gradient_and_says_so(streamed, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)
    model = LanguageModel(toy_in_place())
    model.streamed = streamed
    with pytest.raises(RunError, match=r"its blocks write into what they read.*leave out .*--fisher"):
        row_fisher(model, tiny_tokens(), Store(tmp_path, 0))


def test_a_shared_module_is_dense_until_its_last_use():
    toy = toy_of_shared_module()
    model = LanguageModel(toy)
    shared = [m for m in model.matrices if m.earlier]
    assert [(m.name, m.block, [use.block for use in m.uses]) for m in shared] == [
        (f"model.layers.2.inner.{i}", 2, [0, 2]) for i in (0, 2)
    ]
    assert len(model.matrices) == 6
    for step in walk(model, tiny_tokens(), "diagonal", batch_size=4):
        assert [m.name.split(".")[2] for m in step.matrices] == [str(step.block)] * len(step.matrices)
        for matrix in step.matrices:
            matrix.write(torch.zeros_like(matrix.weight))
        assert bool(toy.model.layers[0].inner[0].weight.any()) == (step.block < 2)


def test_one_matrix_tied_between_two_modules_has_the_statistics_of_both():
    toy = Toy([Block() for _ in range(3)])
    toy.model.layers[2].inner[0].weight = toy.model.layers[0].inner[0].weight
    model, tokens = LanguageModel(toy), tiny_tokens()
    expected = sums_by_hook(toy, tokens)
    both = sum(expected[toy.model.layers[block].inner[0]][1] for block in (0, 2))
    steps = {m.name: step.stats[m.name] for step in walk(model, tokens, "gram") for m in step.matrices}
    assert len(steps) == 5
    torch.testing.assert_close(steps["model.layers.2.inner.0"].gram.double(), both, rtol=1e-4, atol=1e-3)


class Direct(Block):
    """Uses a linear map's weight without calling it."""

    def __init__(self, product):
        super().__init__()
        self.direct, self.product = nn.Linear(16, 16, bias=False), product

    def forward(self, hidden):
        return super().forward(hidden + self.product(self.direct.weight, hidden))


PRODUCTS = {
    "linear": lambda weight, x: nn.functional.linear(x, weight),
    "before": lambda weight, x: (weight @ x.mT).mT,
    "after": lambda weight, x: x @ weight.T,
    "einsum": lambda weight, x: torch.einsum("oi,bsi->bso", weight, x),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_weight_read_without_its_module_has_statistics(product):
    model = LanguageModel(Toy([Direct(PRODUCTS[product]) for _ in range(2)]))
    tokens, inputs = tiny_tokens(), []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    model.hidden_states(tokens)
    x = inputs[0].flatten(0, -2).double()
    step = next(walk(model, tokens, "gram", batch_size=4))
    found = step.stats["model.layers.0.direct"]
    assert found.tokens == tokens.numel()
    torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)


class Einsum(Block):
    """All experts at once, in a product of copies of them."""

    def __init__(self):
        super().__init__()
        self.choose = nn.Linear(16, 3)
        self.a, self.b = nn.Parameter(torch.randn(3, 16, 24)), nn.Parameter(torch.randn(3, 24, 16))

    def forward(self, hidden):
        inner = torch.einsum("bsd,edf->besf", hidden, self.a).tanh()
        written = torch.einsum("besf,efd->besd", inner, self.b)
        return super().forward(torch.einsum("besd,bse->bsd", written, self.choose(hidden).softmax(-1)))


class Routed(Block):
    """Linear maps of which the first alone is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, hidden):
        return super().forward(hidden + self.experts[0](hidden))


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: Direct(lambda weight, x: x), "direct", "its block shows no product with it"),
        (lambda: Direct(lambda weight, x: x * weight.sum()), "direct", "shows no product with it"),
        (Einsum, "a.1", "its block shows no product with it"),
        (Routed, "experts.2", "no calibration token is routed to it"),
    ],
)
def test_a_matrix_without_statistics_is_pruned_by_magnitude_and_says_why(make, name, reason):
    model, events = LanguageModel(Toy([make(), Block()])), []
    prune_model(model, PRUNERS["wanda"], targets_of(model), Pattern(), tiny_tokens(), events=events)
    message = next(event["message"] for event in events if event["matrix"] == f"model.layers.0.{name}")
    assert reason in message
    assert message.endswith("pruned by magnitude")
    assert abs(sparsity_by_matrix(model)[f"model.layers.0.{name}"] - targets_of(model)[f"model.layers.0.{name}"]) < 1e-2


def keeps(blocks, hidden, tokens):
    hidden = in_turn(blocks[:2], hidden, tokens)
    return blocks[2](hidden + blocks[0].kept)


class Keeping(Block):
    def forward(self, hidden):
        self.kept = super().forward(hidden)
        return self.kept.clone()


def changes_weights(blocks, hidden, tokens):
    blocks[0].inner[0].weight.data.div_(2)
    return in_turn(blocks, hidden, tokens)


def noisy(blocks, hidden, tokens):
    for block in blocks:
        hidden = block(hidden + torch.rand_like(hidden))
    return hidden


REFUSED = {
    "what its blocks keep": lambda: Toy([Keeping() for _ in range(3)], keeps),
    "does not reach block 2": lambda: Toy([Block() for _ in range(3)], lambda b, h, t: in_turn(b[:2], h, t)),
    "in another order": lambda: Toy([Block() for _ in range(3)], lambda b, h, t: in_turn(b[::-1], h, t)),
    "one after the other do not give": lambda: Toy([Block() for _ in range(3)], noisy),
}


def test_a_model_that_changes_its_own_weights_is_refused_before_the_work():
    settings = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 64}
    for every, advice in ((2, "rescale_every"), (0, None), (6, None)):  # in four blocks 6 divides by one
        config = transformers.RwkvConfig(rescale_every=every, **settings)
        model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
        if advice is None:
            model.check(Pattern())
            continue
        with pytest.raises(RunError, match=f"changes its own weights .*attention.output.*{advice}"):
            model.check(Pattern())
    for look in (lambda model: model.check(Pattern()), lambda model: BlockwisePass(model, tiny_tokens(), 2)):
        with pytest.raises(RunError, match=r"Toy changes its own weights .*model.layers.0.inner.0.weight"):
            look(LanguageModel(Toy([Block() for _ in range(3)], changes_weights)))


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_its_blocks_do_not_reproduce_is_refused_with_the_reason(reason):
    model = LanguageModel(REFUSED[reason]())
    with pytest.raises(RunError, match=rf"--model Toy: Toy cannot be pruned block by block: .*{reason}"):
        BlockwisePass(model, tiny_tokens(), 2)


def test_windows_that_take_another_way_are_refused():
    def walk(blocks, hidden, tokens):
        order = blocks if int(tokens[0, 0]) % 2 else [blocks[1], blocks[0], blocks[2]]
        return in_turn(order, hidden, tokens)

    tokens = tiny_tokens(2)
    tokens[:, 0] = torch.tensor([5, 6])
    with pytest.raises(RunError, match="not all windows go through its blocks in the same order"):
        BlockwisePass(LanguageModel(Toy([Block() for _ in range(3)], walk)), tokens, 1)
