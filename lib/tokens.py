"""A model's tokenizer, giving the tokens of the published protocols.

Those ran `AutoTokenizer(use_fast=False)` of transformers 4. Where a folder holds a sentencepiece model, sentencepiece
itself cut the text there, and the tokenizers of the LLaMA kind put BOS in front of it unless told otherwise.
transformers 5 converts the model, and what the conversion leaves open comes out otherwise: BOS, the space in front, the
model's own normalisation.
"""

import json
import string
from pathlib import Path

import sentencepiece
import torch
import transformers
from torch import Tensor
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_sentencepiece import SPIECE_UNDERLINE, SentencePieceBackend
from transformers.tokenization_utils_tokenizers import TokenizersBackend

SETTINGS = "tokenizer_config.json"
PLAIN = "the river and the stone house in a garden of light"  # nothing here to normalise


class LlamaTokenizer(SentencePieceBackend):
    """As transformers 4 had it: sentencepiece on the text between special tokens, BOS in front.

    With `legacy`, the default there, every such part of the text gets the space in front that the model asks for,
    without it only the first. A special token named by the empty string has the id of sentencepiece's unknown piece.
    """

    def __init__(
        self, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=False,
        legacy=None, **settings,
    ):  # fmt: skip
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        super().__init__(
            unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, add_bos_token=add_bos_token,
            add_eos_token=add_eos_token, legacy=True if legacy is None else legacy, **settings,
        )  # fmt: skip

    def tokenize(self, text: str, **options) -> list[str]:
        """The text as pieces of the model and special tokens."""
        if self.legacy or not text:
            return super().tokenize(text, **options)
        tokens = super().tokenize(SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " "), **options)
        special_first = len(tokens) > 1 and tokens[0] == SPIECE_UNDERLINE and tokens[1] in self.all_special_tokens
        return tokens[1:] if special_first else tokens

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Each sequence between BOS and EOS, as the settings say and where there are any."""
        before = [self.bos_token_id] if self.add_bos_token and self.bos_token is not None else []
        after = [self.eos_token_id] if self.add_eos_token and self.eos_token is not None else []
        second = [] if token_ids_1 is None else before + token_ids_1 + after
        return before + token_ids_0 + after + second

    def settings(self, written: dict) -> dict:
        """tokenizer_config.json for every generation of transformers to read, from what this one has `written`.

        It leaves out whether BOS and EOS are added, and cannot read an empty name again. In such a one's place stands
        the name of its id, which was not looked for in a text before and is not then.
        """
        settings = written | {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        del settings["backend"]
        unknown = self.sp_model.id_to_piece(self.sp_model.unk_id())
        if empty := _empty(settings):
            settings["split_special_tokens"] = self.split_special_tokens or unknown not in self.added_tokens_encoder
            settings |= dict.fromkeys(empty, unknown)
        return settings


class CodeLlamaTokenizer(LlamaTokenizer):
    """Never `legacy`."""

    def __init__(self, legacy=None, **settings):
        super().__init__(legacy=False, **settings)


class GemmaTokenizer(LlamaTokenizer):
    """Under names of its own, and always `legacy`."""

    def __init__(self, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", legacy=None, **settings):
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, legacy=True, **settings)


FAMILIES = {kind.__name__.lower(): kind for kind in (LlamaTokenizer, CodeLlamaTokenizer, GemmaTokenizer)}


class AutoTokenizer:
    """transformers' AutoTokenizer, but for the families whose tokens it would change."""

    @staticmethod
    def from_pretrained(path: str, config, **options):
        """The tokenizer in a local folder, of a model with that configuration."""
        folder = Path(path)
        if "gguf_file" in options or not folder.is_dir():
            return transformers.AutoTokenizer.from_pretrained(path, **options)
        settings = json.loads((folder / SETTINGS).read_text("utf-8")) if (folder / SETTINGS).is_file() else {}
        named = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None) or ""
        if "auto_map" in settings and options.get("trust_remote_code"):
            family = None
        else:
            family = _family(named, config.model_type)
        serialised = (folder / "tokenizer.json").is_file()
        if family and serialised:  # transformers 5 reads these two settings only where there is no tokenizer.json
            options |= {key: settings[key] for key in ("add_bos_token", "add_eos_token") if key in settings}
        # A name that ends in Fast was obeyed even by use_fast=False.
        if family and _is_sentencepiece(folder / "tokenizer.model") and not (serialised and named.endswith("Fast")):
            return family.from_pretrained(path, **options)
        options |= dict.fromkeys(_empty(settings))  # names in old conversions that transformers 5 never resolves
        if family and serialised:  # as it is: the class would make one of its own out of the vocabulary
            tokenizer = TokenizersBackend.from_pretrained(path, **options)
            told = {"add_bos_token", "add_eos_token"} & settings.keys()
            if told or (named and tokenizer.bos_token):  # the class puts BOS in front whatever the file says
                tokenizer.add_eos_token = settings.get("add_eos_token", False)
                tokenizer.add_bos_token = settings.get("add_bos_token", True)
            return tokenizer
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        if not serialised and "auto_map" not in settings:
            for model in filter(_is_sentencepiece, folder.glob("*.model")):
                _check_pieces(tokenizer, model)
        return tokenizer


def encode(tokenizer, text: str, special: bool = True) -> Tensor:
    """The text's ids, (tokens,) int64; `special` with what the tokenizer itself puts around it."""
    found = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return torch.tensor(found, dtype=torch.int64)


def prefix(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    text = string.ascii_letters + string.digits  # some of it is in every vocabulary
    bare, whole = (encode(tokenizer, text, special).tolist() for special in (False, True))
    return next(whole[:i] for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)


def bos(tokenizer) -> int | None:
    """The token that begins a sequence: the one that the tokenizer begins with, or else the one that it calls so."""
    begins = prefix(tokenizer)
    return begins[0] if begins else tokenizer.bos_token_id


def describe_prefix(tokenizer, every: bool) -> str:
    """What windows begin with, in words; `every` of them with BOS."""
    ids = [bos(tokenizer)] if every else prefix(tokenizer)
    said = " ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids)
    if every:
        return f"every window begins with {said}"
    return f"the text that windows are cut from begins with {said or 'no special token'}" + ", once" * bool(said)


def _family(named: str, model_type: str) -> type[LlamaTokenizer] | None:
    """The class of that name, whatever its capitals and with or without Fast; without a name, by the kind of model."""
    kind = named or TOKENIZER_MAPPING_NAMES.get(model_type)
    if not named and kind in (None, "TokenizersBackend", "MistralCommonBackend"):  # no class of its own any more
        return LlamaTokenizer
    return FAMILIES.get(kind.lower().removesuffix("fast"))


def _empty(settings: dict) -> list[str]:
    """The special tokens that are named by the empty string."""
    return [key for key, value in settings.items() if key.endswith("_token") and value == ""]


def _check_pieces(tokenizer, model: Path) -> None:
    """ValueError where transformers made something else out of a sentencepiece model: what it makes of some knows
    hardly a word, without saying so.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [sp.id_to_piece(i) for i in sp.encode(PLAIN) if not sp.is_unknown(i)]
    found = tokenizer.convert_ids_to_tokens(encode(tokenizer, PLAIN, special=False).tolist())
    if [token for token in found if token != tokenizer.unk_token] != pieces:
        made = f"transformers {transformers.__version__} makes of {model.name} ({type(tokenizer).__name__})"
        raise ValueError(f"what {made} cuts a text otherwise than sentencepiece does; a tokenizer.json is missing")


def _is_sentencepiece(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # of another kind, such as tiktoken's
        return False
    return True
