"""Test that a tokenizer kind and an input format are each added by one file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_kd.data import tokenizer, vocabularies
from megatron_kd.data.discovery import implementations
from megatron_kd.data.preparation import documents, formats
from megatron_kd.data.preparation.formats.document_format import DocumentFormat
from megatron_kd.data.vocabularies.vocabulary import Vocabulary

PACKAGE = Path(tokenizer.__file__).parents[1]

KIND = """
from megatron_kd.data.vocabularies.vocabulary import Vocabulary


class AlphabetVocabulary(Vocabulary):
    library = "numpy"
    description = "a .alphabet file"
    file_names = ("*.alphabet",)

    @classmethod
    def read(cls, file, content, pattern):
        if not content.startswith(b"alphabet:"):
            return None
        letters = content.removeprefix(b"alphabet:")
        return cls([letters[i : i + 1] for i in range(len(letters))], frozenset(), None)

    def encode_batch(self, texts):
        return [self._to_bytes([self.tokens.index(c.encode()) for c in text]) for text in texts]
"""

FORMAT = """
from megatron_kd.data.preparation.formats.document_format import Document, DocumentFormat, open_file


class Paragraphs(DocumentFormat):
    name = "paragraphs"
    suffixes = (".par",)

    def documents(self, unit, text_key, counter):
        with open_file(unit.file.path) as stream:
            for text in stream.read().decode().split("\\n\\n"):
                counter.lines += 1
                yield Document(f"{unit.file.key}:{counter.lines}", counter.lines, text)
"""


def test_a_tokenizer_kind_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alphabet.py").write_text(KIND)
    monkeypatch.setattr(vocabularies, "__path__", [*vocabularies.__path__, str(tmp_path)])
    monkeypatch.setattr(tokenizer, "KINDS", implementations(vocabularies, Vocabulary))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/latin.alphabet").write_bytes(b"alphabet:abc")
    vocabulary, info = tokenizer.load_tokenizer(tmp_path / "folder")
    assert info.vocab_size == 3
    assert vocabulary.encode("cab") == [2, 0, 1]
    assert vocabulary.decode([2, 0, 1]) == "cab"


def test_an_input_format_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paragraphs.py").write_text(FORMAT)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    (paragraphs,) = (
        kind for kind in implementations(formats, DocumentFormat) if kind.name == "paragraphs"
    )
    monkeypatch.setitem(documents.FORMATS, "paragraphs", paragraphs())
    (tmp_path / "text.par").write_text("one\n\ntwo")
    (piece,) = documents.make_pieces(documents.find_text_files([tmp_path / "text.par"]))
    (unit,) = piece
    assert [document.text for document in documents.documents(unit, "text")] == ["one", "two"]


def test_a_run_never_imports_the_preparation() -> None:
    importers = [
        path
        for path in PACKAGE.rglob("*.py")
        if "megatron_kd.data.preparation" in path.read_text(encoding="utf-8")
        and "preparation" not in path.parts
    ]
    assert importers == []


@pytest.fixture(autouse=True)
def forget_modules() -> None:
    for package in (vocabularies, formats):
        for name in ("alphabet", "paragraphs"):
            sys.modules.pop(f"{package.__name__}.{name}", None)
    importlib.invalidate_caches()
