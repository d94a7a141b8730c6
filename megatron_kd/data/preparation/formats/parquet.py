"""Read Parquet files, one document per record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.formats.document_format import (
    Document,
    DocumentFormat,
    LineCounter,
    TextFile,
    Unit,
)

_BATCH_RECORDS, _BATCH_BYTES = 1024, 32_000_000


class Parquet(DocumentFormat):
    """Take one column of each record. A unit holds the row groups start .. end - 1."""

    name: ClassVar[str] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def units(self, file: TextFile, target_bytes: int) -> list[Unit]:
        """Join row groups until they reach `target_bytes`."""
        import pyarrow.parquet as parquet

        try:
            metadata = parquet.read_metadata(file.path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file.path} is not a Parquet file ({error}): "
                "repair it, or leave it out with --exclude"
            ) from error
        units, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= target_bytes or group == metadata.num_row_groups - 1:
                units.append(Unit(file, self.name, start, group + 1, size))
                start, size = group + 1, 0
        return units

    def documents(self, unit: Unit, text_key: str, counter: LineCounter) -> Iterator[Document]:
        """Yield one document per record; see `DocumentFormat.documents`."""
        import pyarrow.parquet as parquet

        groups = list(range(unit.start, unit.end))
        with parquet.ParquetFile(unit.file.path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise ValueError(f"no column {text_key!r} (it has {', '.join(columns)})")
            sizes = [file.metadata.row_group(group).num_rows for group in range(unit.end)]
            first, count = sum(sizes[: unit.start]), sum(sizes[unit.start :])
            # Long records are read a few at a time.
            batch_size = min(_BATCH_RECORDS, max(1, _BATCH_BYTES * count // max(1, unit.size)))
            for batch in file.iter_batches(batch_size, row_groups=groups, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    name = f"{unit.file.key}:{first + counter.lines}"
                    counter.lines += 1
                    if isinstance(text, str):
                        yield Document(name, counter.lines, text)
                    else:
                        yield Document(name, counter.lines, None, "no text in this row")
