"""Read text files, one document per file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from megatron_kd.data.preparation.formats.document_format import (
    Document,
    DocumentFormat,
    LineCounter,
    Unit,
    open_file,
)


class PlainText(DocumentFormat):
    """Take a whole file as one document. Files of an unknown suffix have this format."""

    name: ClassVar[str] = "text"

    def documents(self, unit: Unit, text_key: str, counter: LineCounter) -> Iterator[Document]:
        """Yield the only document; see `DocumentFormat.documents`."""
        with open_file(unit.file.path) as stream:
            data = stream.read()
        try:
            yield Document(unit.file.key, 0, data.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Document(unit.file.key, 0, None, f"not UTF-8 at byte {error.start}")
