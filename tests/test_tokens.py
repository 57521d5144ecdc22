"""Tokens of the published protocol, against ids worked out with the sentencepiece library."""

import json

import pytest
import sentencepiece
import transformers
from pieces import load, model_folder, text_of, train
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lib import RunError, evaluation_windows, find_source, load_tokenizer, tokens
from lib.results.tokenizer import save_tokenizer

TEXTS = [
    "river house in the garden", " river house", "   river   house  ", "\n\n = the river = \n\n \n the", " ", "",
    "naïve café ★ 你好\ttab",
]  # fmt: skip
BETWEEN = "the <unk> river<s>stone</s> house"  # special tokens in the text itself
ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {key: {**ADDED, "content": mark} for key, mark in MARKS.items()}
OLD = dict.fromkeys(MARKS, "")
CLASS = {"tokenizer_class": "LlamaTokenizer"}


@pytest.fixture(scope="module")
def models_of():
    """LLaMA's kind of model, and one that normalises, drops doubled spaces and is no BPE."""
    plain = {"model_type": "unigram", "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"}
    return {"bpe": train(), "unigram": train(**plain)}


def pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


# what tokenizer_config.json holds (None: there is none), what special_tokens_map.json, and the ids around a text
FOLDERS = {
    "nothing else": (None, None, [1], []),
    "a class": (CLASS, None, [1], []),
    "another length": ({"model_max_length": 64}, None, [1], []),
    "as LLaMA": ({**CLASS, **LLAMA, "add_bos_token": True, "add_eos_token": False}, None, [1], []),
    "legacy": ({**CLASS, "legacy": True}, None, [1], []),
    "not legacy": ({**CLASS, "legacy": False}, None, [1], []),
    "no BOS": ({**CLASS, "add_bos_token": False}, None, [], []),
    "EOS too": ({**CLASS, "add_eos_token": True}, None, [1], [2]),
    "old names": ({**CLASS, **OLD}, {}, [0], []),
    "old names mended": ({**CLASS, **OLD}, MARKS, [1], []),
    "old class": ({"tokenizer_class": "LLaMATokenizer"}, None, [1], []),
    "old class and names": ({"tokenizer_class": "LLaMATokenizer", **OLD}, None, [0], []),
    "special tokens beside": (CLASS, {"bos_token": "</s>", "unk_token": "<unk>"}, [2], []),
    "CodeLlama": ({"tokenizer_class": "CodeLlamaTokenizer"}, None, [1], []),
}  # fmt: skip


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_sentencepiece_folder_gives_sentencepieces_ids_after_bos(name, model, models_of, tmp_path):
    settings, beside, before, after = FOLDERS[name]
    folder = model_folder(tmp_path / "model", models_of[model], settings)
    if beside is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(beside))
    tokenizer, sp = load_tokenizer(find_source(str(folder))), pieces(models_of[model])
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*before, *sp.encode(text), *after], text
        assert tokens.encode(tokenizer, text, special=False).tolist() == sp.encode(text), text
    assert tokens.prefix(tokenizer) == before
    assert tokens.bos(tokenizer) == (before or [1])[0]

    save_tokenizer(tokenizer, tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text((folder / "config.json").read_text())
    again = load_tokenizer(find_source(str(tmp_path / "saved")))
    for text in [*TEXTS, BETWEEN]:
        assert again(text).input_ids == tokenizer(text).input_ids, text
    if model == "bpe":  # of the other kind transformers 5 makes something else
        assert load(tmp_path / "saved")(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_special_tokens_in_a_text_part_it_and_legacy_puts_a_space_behind_them(models_of, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(models_of["bpe"])
    proto.normalizer_spec.add_dummy_prefix = False
    spaced, bare = pieces(models_of["bpe"]), pieces(proto.SerializeToString())
    for legacy, later in ((True, spaced), (False, bare)):
        folder = model_folder(tmp_path / f"{legacy}", models_of["bpe"], {**CLASS, **LLAMA, "legacy": legacy})
        tokenizer = load_tokenizer(find_source(str(folder)))
        parts = [
            spaced.encode("the "),
            [0],
            later.encode(" river"),
            [1],
            later.encode("stone"),
            [2],
            later.encode(" house"),
        ]
        expected = [1, *(i for part in parts for i in part)]
        assert tokenizer(BETWEEN).input_ids == expected
    # An empty name is looked for nowhere: the text that looks like a special token is text.
    tokenizer = load_tokenizer(find_source(str(model_folder(tmp_path / "old", models_of["bpe"], {**CLASS, **OLD}))))
    assert tokenizer(BETWEEN).input_ids == [0, *spaced.encode(BETWEEN)]


def test_gemma_has_bos_and_no_space_in_front(tmp_path):
    model = train(
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        pad_piece="<pad>",
    )
    for settings in (None, {"tokenizer_class": "GemmaTokenizer"}):
        folder = model_folder(tmp_path / f"{settings is None}", model, settings, model_type="gemma")
        tokenizer = load_tokenizer(find_source(str(folder)))
        for text in TEXTS:
            assert tokenizer(text).input_ids == [2, *pieces(model).encode(text)]


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer", "legacy": True}])
def test_mistrals_folders_are_llamas(settings, models_of, tmp_path):
    folder = model_folder(tmp_path / "model", models_of["bpe"], settings, model_type="mistral")
    tokenizer = load_tokenizer(find_source(str(folder)))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *pieces(models_of["bpe"]).encode(text)]


def serialised(model: bytes, bos: bool = True) -> Tokenizer:
    """The model as transformers 4 converted it."""
    sp = pieces(model)
    vocabulary = {sp.id_to_piece(i): i for i in range(len(sp))}
    ranked = sorted(range(len(sp)), key=lambda i: -sp.get_score(i))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (sp.id_to_piece(i) for i in ranked if not sp.is_byte(i) and not sp.is_control(i) and i)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


@pytest.mark.parametrize(
    ("settings", "vocabulary", "before"),
    [
        (CLASS, True, [1]),
        (None, True, [1]),
        ({**CLASS, "add_bos_token": False}, True, []),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True, [1]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, **LLAMA}, False, []),
        (CLASS, False, [1]),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False, [1]),
        ({**CLASS, **OLD}, False, [1]),
    ],
)
def test_a_tokenizer_json_beside_the_model_or_alone_loses_no_space_and_no_bos(
    settings, vocabulary, before, models_of, tmp_path
):
    folder, model = model_folder(tmp_path / "model", models_of["bpe"], settings), models_of["bpe"]
    serialised(model).save(str(folder / "tokenizer.json"))
    if not vocabulary:
        (folder / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(find_source(str(folder)))
    for text in filter(None, TEXTS):
        assert tokenizer(text).input_ids == [*before, *pieces(model).encode(text)], text
    assert tokens.bos(tokenizer) == 1


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [  # as LlamaTokenizerFast of transformers 4: BOS unless told otherwise, whatever the file says
        ("<s> $A", {"add_eos_token": True}, [1, 0, 2]),
        ("<s> $A </s>", {}, [1, 0]),
        (None, {}, [1, 0]),
        ("<s> $A", {"add_bos_token": False}, [0]),
        (None, {"add_bos_token": None}, [0]),
    ],
)
def test_a_tokenizer_json_alone_has_the_classs_bos_and_eos(template, settings, expected, tmp_path):
    made = Tokenizer(models.WordLevel({"river": 0, "<s>": 1, "</s>": 2}, unk_token="river"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    if template:
        made.post_processor = processors.TemplateProcessing(template, None, [("<s>", 1), ("</s>", 2)])
    folder = model_folder(tmp_path / "model", b"", {"tokenizer_class": "LlamaTokenizerFast", **MARKS, **settings})
    (folder / "tokenizer.model").unlink()
    made.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(find_source(str(folder)))
    assert tokenizer("river").input_ids == expected
    save_tokenizer(tokenizer, folder)
    assert load_tokenizer(find_source(str(folder)))("river").input_ids == expected


def test_without_a_bos_token_none_is_put_in_front(models_of, tmp_path):
    folder = model_folder(tmp_path / "model", models_of["bpe"], {**CLASS, "bos_token": None})
    tokenizer = load_tokenizer(find_source(str(folder)))
    assert tokenizer("the river").input_ids == pieces(models_of["bpe"]).encode("the river")
    assert tokens.prefix(tokenizer) == []
    assert tokens.bos(tokenizer) is None


def test_what_is_put_in_front_is_seen_where_hardly_a_letter_is_known():
    made = Tokenizer(models.BPE({"A": 0, "C": 1, "<s>": 2}, []))  # what it does not know it drops
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 2)])
    assert tokens.prefix(transformers.PreTrainedTokenizerFast(tokenizer_object=made)) == [2]


def test_a_sentencepiece_model_that_transformers_makes_something_else_of_is_one_line(models_of, tmp_path):
    folder = model_folder(tmp_path / "xglm", models_of["unigram"], model_type="xglm")
    (folder / "tokenizer.model").rename(folder / "sentencepiece.bpe.model")
    with pytest.raises(RunError, match=r"sentencepiece.bpe.model \(XGLMTokenizer\) cuts a text otherwise"):
        load_tokenizer(find_source(str(folder)))


def test_other_kinds_are_left_to_transformers(tmp_path):
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="x").save_pretrained(tmp_path / "gpt2")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    tokenizer, own = load_tokenizer(find_source(str(tmp_path / "gpt2"))), load(tmp_path / "gpt2")
    assert type(tokenizer) is type(own)
    for text in TEXTS:
        assert tokenizer(text).input_ids == own(text).input_ids
    assert tokens.prefix(tokenizer) == []
    assert tokens.bos(tokenizer) == tokenizer.bos_token_id

    model = train(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    folder = model_folder(tmp_path / "t5", model, model_type="t5")
    tokenizer = tokens.AutoTokenizer.from_pretrained(str(folder), transformers.T5Config())
    assert type(tokenizer) is transformers.T5Tokenizer
    assert tokenizer("the river").input_ids[-1] == 1


def test_every_window_begins_with_bos_where_asked(models_of, tmp_path):
    tokenizer = load_tokenizer(find_source(str(model_folder(tmp_path / "model", models_of["bpe"]))))
    (tmp_path / "text.txt").write_text(text := text_of(300))
    ids = pieces(models_of["bpe"]).encode(text)
    once = evaluation_windows(str(tmp_path / "text.txt"), tokenizer, seqlen=16)
    assert once.flatten().tolist() == [1, *ids][: len(once) * 16]
    every = evaluation_windows(str(tmp_path / "text.txt"), tokenizer, seqlen=16, add_bos="every")
    assert every.tolist() == [[1, *ids[i : i + 15]] for i in range(0, len(ids) - 14, 15)]
    assert (
        tokens.describe_prefix(tokenizer, every=False) == "the text that windows are cut from begins with <s> (1), once"
    )
    assert tokens.describe_prefix(tokenizer, every=True) == "every window begins with <s> (1)"


def test_what_is_no_sentencepiece_model_is_one_line(tmp_path):
    folder = model_folder(tmp_path / "model", b"version https://git-lfs.github.com/spec/v1\n", CLASS)
    with pytest.raises(RunError, match=f"--model {folder}: its tokenizer cannot be loaded"):
        load_tokenizer(find_source(str(folder)))
