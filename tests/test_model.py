import pytest
import torch
import transformers
from shared import MODEL, needs_model
from tiny import tiny_model

from lib import LanguageModel, RunError, find_source
from lib.load import choose_device, choose_dtype, load_model, load_tokenizer, window_limit


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
    assert window_limit(model.model.config) == 64


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
