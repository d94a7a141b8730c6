"""Read JSON lines: one document per line, or the whole line for conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import IO, Any, ClassVar

from megatron_kd.data.preparation.formats.document_format import (
    Document,
    DocumentFormat,
    LineCounter,
    TextFile,
    Unit,
    is_compressed,
    one_line,
    open_file,
)

_MAX_REPORTED_KEYS = 6
_BLOCK_BYTES = 1 << 20


class WholeLines(DocumentFormat):
    """Take each line that is not blank as one document, without parsing it.

    A unit holds the lines that begin in bytes [start, end). A compressed file is one unit, because
    its middle can only be reached by reading its beginning.
    """

    name: ClassVar[str] = "lines"
    internal: ClassVar[bool] = True

    def units(self, file: TextFile, target_bytes: int) -> list[Unit]:
        """Cut a file at multiples of `target_bytes`."""
        if is_compressed(file.path) or not file.size:
            return super().units(file, target_bytes)
        units = []
        for start in range(0, file.size, target_bytes):
            end = min(start + target_bytes, file.size)
            units.append(Unit(file, self.name, start, end, end - start))
        return units

    def documents(self, unit: Unit, text_key: str, counter: LineCounter) -> Iterator[Document]:
        """Yield one document per line; see `DocumentFormat.documents`."""
        compressed = is_compressed(unit.file.path)
        with open_file(unit.file.path) as stream:
            offset = 0
            if unit.start:
                stream.seek(unit.start - 1)
                offset = unit.start - 1 + skip_line(stream, unit.end - unit.start + 1)
            while compressed or offset < unit.end:
                data = stream.readline()
                if not data:
                    return
                counter.lines += 1
                name, offset = f"{unit.file.key}:{offset}", offset + len(data)
                if not data.isspace():
                    text, problem = self.text_of(data, text_key)
                    data = b""  # a line can be as long as memory is large
                    yield Document(name, counter.lines, text, problem)

    def text_of(self, data: bytes, text_key: str) -> tuple[str | None, str]:
        """Return the text of one line, or None and the reason."""
        try:
            return data.decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            return None, "not UTF-8"

    def lines_before(self, unit: Unit) -> int:
        """Return the lines before the first that begins in the unit."""
        if not unit.start:
            return 0
        lines, remaining = 0, unit.start - 1
        with open(unit.file.path, "rb") as stream:
            while remaining:
                block = stream.read(min(remaining, _BLOCK_BYTES))
                if not block:
                    break
                remaining -= len(block)
                lines += block.count(b"\n")
        return lines + 1


class JsonLines(WholeLines):
    """Take the text under one key of each line."""

    name: ClassVar[str] = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")
    internal: ClassVar[bool] = False

    def __init__(self) -> None:
        self._parse = json_parser()

    def text_of(self, data: bytes, text_key: str) -> tuple[str | None, str]:
        """Return the text of one line, or None and the reason."""
        try:
            record = self._parse(data)
        except ValueError:
            # The standard library accepts more (NaN, a byte order mark) and explains a failure.
            try:
                record = json.loads(data)
            except UnicodeDecodeError:
                return None, "not UTF-8"
            except (ValueError, RecursionError) as error:
                return None, f"not JSON: {one_line(error)}"
        if not isinstance(record, dict):
            return None, "no JSON object"
        if text_key not in record:
            return None, f"no key {text_key!r}{_list_keys(record)}"
        text = record[text_key]
        if not isinstance(text, str):
            return None, f"{text_key!r} is not a string"
        try:
            # JSON can hold half of a surrogate pair, which is no text.
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError:
            return None, f"{text_key!r} holds half of a surrogate pair"
        return text, ""


def _list_keys(record: dict[str, Any]) -> str:
    if not record:
        return ""
    ellipsis = ", ..." if len(record) > _MAX_REPORTED_KEYS else ""
    return f", it has {', '.join(map(repr, list(record)[:_MAX_REPORTED_KEYS]))}{ellipsis}"


def skip_line(stream: IO[bytes], max_bytes: int) -> int:
    """Skip to the end of a line, in blocks, and return the number of bytes skipped.

    Reading stops after `max_bytes` or a little more if the line is longer.
    """
    skipped = 0
    while skipped < max_bytes:
        block = stream.readline(_BLOCK_BYTES)
        skipped += len(block)
        if not block or block.endswith(b"\n"):
            break
    return skipped


def json_parser() -> Callable[[bytes], Any]:
    """Return orjson's parser if it is installed: the same values, several times faster."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads
