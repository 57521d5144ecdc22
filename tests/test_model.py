import contextlib

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from shared import MODEL, needs_model
from tiny import tiny_model, tiny_tokens
from torch import nn
from toy import Block, Toy

import main
from lib import LanguageModel, Pattern, RunError, find_source
from lib.blockwise import BlockwisePass
from lib.config import RunConfig
from lib.load import choose_device, choose_dtype, context_length, load_model, load_tokenizer


def test_matrices_are_shown_as_out_in_and_written_in_place():
    hf = tiny_model("gpt2")
    matrix = LanguageModel(hf).matrices[0]
    stored = hf.transformer.h[0].attn.c_attn.weight  # (in, out) in a Conv1D
    assert matrix.shape == (96, 32) == tuple(stored.T.shape)
    matrix.write(torch.arange(96 * 32.0).view(96, 32))
    assert torch.equal(stored.data, torch.arange(96 * 32.0).view(96, 32).T)


def test_an_expert_is_a_matrix_of_its_own():
    hf = tiny_model("mixtral")
    model = LanguageModel(hf)
    matrix = next(m for m in model.matrices if m.name == "model.layers.1.mlp.experts.down_proj.2")
    tensor = hf.model.layers[1].mlp.experts.down_proj
    before = tensor.data.clone()
    matrix.write(torch.zeros(matrix.shape))
    assert torch.equal(tensor.data[2], torch.zeros_like(tensor.data[2]))
    assert torch.equal(tensor.data[[0, 1, 3]], before[[0, 1, 3]])


def test_a_list_of_expert_modules_and_its_linear_router():
    """Mixtures as remote code still writes them: a ModuleList of experts beside an nn.Linear gate."""
    hf = tiny_model("llama")
    for layer in hf.model.layers:
        expert = layer.mlp
        moe = torch.nn.Module()
        moe.gate = torch.nn.Linear(32, 3)
        moe.experts = torch.nn.ModuleList([type(expert)(hf.config) for _ in range(3)])
        layer.mlp = moe
    names = [m.name for m in LanguageModel(hf).matrices_of(0)]
    assert len(names) == 4 + 3 * 3
    assert not any(name.endswith("mlp.gate") for name in names)


def test_digest_follows_the_weights():
    one, two, other = (LanguageModel(tiny_model("llama", seed)) for seed in (0, 0, 1))
    assert one.digest == two.digest != other.digest
    three = LanguageModel(tiny_model("llama"))
    three.matrices[-1].weight[0, 0] += 1
    assert three.digest != one.digest


def test_a_model_without_blocks_is_refused():
    with pytest.raises(RunError, match="no list of decoder blocks"):
        LanguageModel(torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4)))


def config_folder(config, folder) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("options", [{}, {"stream": True, "save_model": "out"}, {"analyze_only": True}])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.BartConfig(), "encoder-decoder"),
        (transformers.Qwen2_5_VLConfig(), "no causal LM to transformers' AutoModelForCausalLM"),
        (transformers.ViTConfig(), "no causal LM to transformers' AutoModelForCausalLM"),
    ],
)
def test_what_is_no_causal_lm_is_refused_on_every_path(config, says, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"prune_method": "magnitude", "sparsity_ratio": 0.5} if "analyze_only" not in options else {}
    with pytest.raises(RunError, match=says) as raised:
        main.run(RunConfig(model=config_folder(config, tmp_path / "model"), **flags, **options))
    assert "\n" not in str(raised.value)
    assert "--model" in str(raised.value)


def test_a_model_that_reads_ahead_is_refused():
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(RunError, match=r'is no causal LM as it is.*"is_decoder": true'):
        model.check(Pattern())
    LanguageModel(tiny_model("bert")).check(Pattern())  # with it


def test_logits_from_more_than_the_last_hidden_state_are_refused():
    hf = tiny_model("llama")
    forward = hf.forward
    hf.forward = lambda *args, **kwargs: forward(*args, **kwargs) if hf.model(*args, **kwargs).past_key_values else None
    with pytest.raises(RunError, match="from more than its last hidden state"):
        LanguageModel(hf).check(Pattern())


@pytest.mark.parametrize("streamed", [False, True])
def test_several_lists_of_blocks_come_in_the_order_of_the_forward(streamed):
    config = transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, causal=True)
    with init_empty_weights() if streamed else contextlib.nullcontext():
        model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
    kinds = ("attentions", "ffns")
    assert model.block_names == [f"transformer.{kind}.{index}" for index in range(2) for kind in kinds]
    assert len(model.matrices) == 2 * (4 + 2)
    assert all(parameter.is_meta == streamed for parameter in model.model.parameters())
    assert type(model.body).__name__ == "XLMModel"


def test_a_list_that_text_does_not_reach_holds_no_blocks():
    """Encoders of images and sounds beside the text's blocks, in one body."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GitConfig(
        vision_config=vision | {"image_size": 28, "patch_size": 14}, vocab_size=96, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
    assert model.block_names == ["git.encoder.layer.0", "git.encoder.layer.1"]


def test_lists_whose_order_no_forward_tells_are_refused():
    config = transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    hf.transformer.forward = lambda *_a, **_k: 1 / 0
    with pytest.raises(RunError, match=r"several lists of blocks \(transformer.attentions, transformer.ffns\)"):
        LanguageModel(hf)


def test_coverage_is_the_share_of_all_parameters():
    hf = tiny_model("llama_tied")
    model = LanguageModel(hf)
    linear = sum(m.weight.numel() for m in hf.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert model.prunable_parameters == linear
    assert model.coverage == linear / sum(p.numel() for p in set(hf.parameters()))


@pytest.mark.parametrize(
    ("dtype", "device", "checkpoint", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, torch.float32),
        ("auto", "cuda", torch.bfloat16, torch.bfloat16),
        ("auto", "cuda", torch.float32, torch.float16),
        ("auto", "cuda:1", None, torch.float16),
        ("bfloat16", "cpu", torch.float32, torch.bfloat16),
    ],
)
def test_dtype(dtype, device, checkpoint, expected):
    assert choose_dtype(dtype, device, checkpoint) == expected


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(RunError, match="--device"):
        choose_device(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_on_cuda_agrees_with_the_cpu(pruner):
    from tiny import tiny_tokens

    from lib import PRUNERS, Pattern, prune_model

    pruned = []
    for device in ("cpu", "cuda"):
        model = LanguageModel(tiny_model("llama").to(device))
        targets = dict.fromkeys([m.name for m in model.matrices], 0.5)
        prune_model(model, PRUNERS[pruner], targets, Pattern(), tiny_tokens(), batch_size=4)
        pruned.append(torch.cat([(m.weight.cpu() == 0).flatten() for m in model.matrices]))
    assert (pruned[0] != pruned[1]).float().mean() < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_loads_in_the_dtype_asked_for(tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    model = load_model(find_source(str(tmp_path)), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}
    assert context_length(model.model.config) == 64
    assert context_length(transformers.XLNetConfig()) is None  # it says -1


def test_remote_code_needs_permission(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(RunError, match="trust_remote_code"):
        load_model(find_source(str(tmp_path)), device="cpu")


@needs_model
def test_gguf_becomes_an_ordinary_model(embedded):
    model = load_model(find_source(str(embedded)), device="cpu")
    assert len(model.blocks) == 30
    assert len(model.matrices) == 210
    assert model.coverage == pytest.approx(0.789, abs=1e-3)
    assert getattr(model.model.config, "quantization_config", None) is None
    text, tokenizer = "It's 3,14 café\n\n = x =", load_tokenizer(find_source("smollm2", str(MODEL.parent)))
    assert transformers.AutoTokenizer.from_pretrained(embedded)(text).input_ids == tokenizer(text).input_ids


def test_a_pickled_checkpoint_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("code in the checkpoint ran",))

    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save({"model.embed_tokens.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RunError, match="weights cannot be loaded"):
        load_model(find_source(str(tmp_path)), device="cpu")


class OtherBody(nn.Module):
    """A body that takes tokens and nothing else and gives `form` of its hidden states."""

    def __init__(self, inner: nn.Module, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, input_ids):
        return self.form(self.inner(input_ids)[0])


class OtherModel(Toy):
    """Its forward takes tokens alone, tells the body others, and gives `form` of its logits."""

    def __init__(self, body, form, last: int = 0):
        super().__init__([Block(), Block()])
        self.model, self.form, self.last = OtherBody(self.model, body), form, last

    def get_input_embeddings(self):
        return self.model.inner.embed

    def forward(self, input_ids):
        hidden = self.model(input_ids.flip(0) // 2)
        return self.form(self.lm_head(hidden if isinstance(hidden, torch.Tensor) else hidden[0])[:, -self.last :])


@pytest.mark.parametrize("body", [lambda hidden: hidden, lambda hidden: (hidden, None)])
@pytest.mark.parametrize("form", [lambda logits: logits, lambda logits: (logits,)])
def test_the_model_calls_its_body_in_its_own_way(body, form):
    hf, tokens = OtherModel(body, form), tiny_tokens()
    model = LanguageModel(hf)
    model.check(Pattern(), tokens)
    own = hf(tokens)
    expected = own if isinstance(own, torch.Tensor) else own[0]
    torch.testing.assert_close(model.logits(model.hidden_states(tokens)), expected, rtol=0, atol=0)
    windows = tiny_tokens(2)
    blockwise = BlockwisePass(model, windows, 2)
    for visit in range(2):
        blockwise.advance(visit)
    ((_, last),) = blockwise.outputs()
    own = hf(windows)
    torch.testing.assert_close(model.logits(last), own if isinstance(own, torch.Tensor) else own[0])


def test_logits_of_some_tokens_only_are_refused():
    with pytest.raises(RunError, match=r"OtherModel does not give logits for every token \(1 of 7\)"):
        LanguageModel(OtherModel(lambda hidden: hidden, lambda logits: logits, last=1)).check(Pattern())
