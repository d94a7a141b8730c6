"""Turn text into Megatron token files: one document per file, or per line of a .jsonl file.

    python tools/preprocess_data.py --input corpus/ --pattern '*.py' --tokenizer tokenizer.model --output data/train --holdout valid=0.05

writes data/train.{bin,idx,json} and, from documents chosen by a hash of their names, data/valid.{bin,idx,json}. The output does
not depend on the number of workers. Files appear under their names only when everything is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_kd.config import ConfigError
from megatron_kd.data.indexed import TokenFileWriter, optimal_dtype
from megatron_kd.data.tokenizer import TextFile, find_text_files, load_tokenizer

_JSONL_RANGE = 4_000_000
_LISTED = 20


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know; `splits` are (name, fraction), the first taking what no other takes."""

    tokenizer: str
    splits: tuple[tuple[str, float], ...]
    append_eod: bool
    text_key: str


@dataclass(frozen=True)
class Unit:
    """Work of one call: a text file, or the lines of a .jsonl file that begin in [start, end)."""

    file: TextFile
    start: int
    end: int


@dataclass
class Encoded:
    """Documents of one unit: per split the ids (one array per document) and the bytes of text, and what was left out."""

    tokens: list[list[np.ndarray]]
    text_bytes: list[int]
    size: int
    empty: int = 0
    unreadable: list[str] = field(default_factory=list)


def parse_holdout(text: str) -> tuple[str, float]:
    name, _, fraction = text.partition("=")
    try:
        value = float(fraction)
    except ValueError:
        value = 0.0
    if not name or os.sep in name or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FRACTION with a fraction in (0, 1), such as valid=0.05")
    return name, value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn text files into Megatron token files (.bin/.idx) with a .json description beside them."
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="text files (one document each), .jsonl files (one per line), or folders")
    add("--pattern", nargs="+", default=["*"], metavar="GLOB", help="names of the files to take from folders (all)")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="names of files and subfolders to leave out")
    add("--tokenizer", required=True, metavar="FILE", help="SentencePiece .model file")
    add("--output", required=True, type=Path, metavar="PREFIX", help="path of the output without .bin/.idx/.json")
    add("--holdout", action="append", default=[], type=parse_holdout, metavar="NAME=FRACTION",
        help="put this share of the documents into NAME beside the output instead; may be given several times")  # fmt: skip
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end every document with the end-of-document id (yes)")
    add("--text-key", default="text", help="key of the text in .jsonl lines (text)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core: %(default)s)")
    add("--strict", action="store_true", help="stop at the first document that cannot be read, in place of counting it")
    parsed = parser.parse_args(arguments)
    names = [parsed.output.name, *(name for name, _ in parsed.holdout)]
    if len(set(names)) < len(names):
        parser.error("the names of --output and --holdout must differ")
    if sum(fraction for _, fraction in parsed.holdout) >= 1:
        parser.error("the fractions of --holdout must sum to less than 1")
    if parsed.workers < 1:
        parser.error("--workers must be at least 1")
    return parsed


def choose_split(key: str, splits: Sequence[tuple[str, float]]) -> int:
    """Index of the split that the document named `key` belongs to: a function of the name alone."""
    point = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    for index, (_, fraction) in enumerate(splits[1:], start=1):
        if point < fraction:
            return index
        point -= fraction
    return 0


def make_units(files: Sequence[TextFile]) -> list[Unit]:
    """Cut .jsonl files by bytes, never by workers, so that the output is the same for any number of them."""
    units = []
    for file in files:
        step = _JSONL_RANGE if file.path.suffix == ".jsonl" else max(file.size, 1)
        units += [Unit(file, start, min(start + step, file.size)) for start in range(0, max(file.size, 1), step)]
    return units


def documents(unit: Unit, text_key: str) -> Iterator[tuple[str, str | None]]:
    """(name, text) of each document; text None where it cannot be read."""
    file = unit.file
    try:
        with open(file.path, "rb") as stream:
            if file.path.suffix != ".jsonl":
                yield file.key, stream.read().decode("utf-8")
                return
            if unit.start:
                stream.seek(unit.start - 1)
                stream.readline()
            while (offset := stream.tell()) < unit.end:
                line = stream.readline()
                if line.strip():
                    yield f"{file.key}:{offset}", text_of(line, text_key)
    except (OSError, UnicodeDecodeError):
        yield file.key, None


def text_of(line: bytes, text_key: str) -> str | None:
    """The text of one .jsonl line, None where there is none."""
    try:
        text = json.loads(line)[text_key]
        # JSON can hold half of a surrogate pair, which is no text.
        text.encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return text


cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


def encode(unit: Unit, settings: Settings) -> Encoded:
    """Tokenise one unit; runs in a worker."""
    processor, info = cached_tokenizer(settings.tokenizer)
    dtype = optimal_dtype(info.vocab_size)
    result = Encoded([[] for _ in settings.splits], [0] * len(settings.splits), unit.end - unit.start)
    for name, text in documents(unit, settings.text_key):
        if text is None:
            result.unreadable.append(name)
        elif not text:
            result.empty += 1
        else:
            split = choose_split(name, settings.splits)
            ids = processor.encode(text, add_eos=settings.append_eod)
            result.tokens[split].append(np.array(ids, dtype=dtype))
            result.text_bytes[split] += len(text.encode("utf-8"))
    return result


@contextmanager
def encoded_units(units: Sequence[Unit], settings: Settings, workers: int) -> Iterator[Iterator[Encoded]]:
    """The results in the order of `units`."""
    work = partial(encode, settings=settings)
    workers = min(workers, len(units))
    if workers == 1:
        yield map(work, units)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.map(work, units, chunksize=max(1, min(16, len(units) // (8 * workers))))
        except BrokenProcessPool as error:
            raise ConfigError("a worker died, most likely for lack of memory: use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def write(arguments: argparse.Namespace, settings: Settings, units: Sequence[Unit]) -> dict[str, object]:
    """Tokenise everything, publish the files, and return the summary."""
    info = cached_tokenizer(settings.tokenizer)[1]
    started, dtype = time.monotonic(), optimal_dtype(info.vocab_size)
    text_bytes, empty = np.zeros(len(settings.splits), dtype=np.int64), 0
    unreadable: list[str] = []
    with ExitStack() as stack:
        prefixes = [arguments.output.with_name(name) for name, _ in settings.splits]
        writers = [stack.enter_context(TokenFileWriter(prefix, dtype)) for prefix in prefixes]
        total = sum(unit.end - unit.start for unit in units)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()))
        for result in stack.enter_context(encoded_units(units, settings, arguments.workers)):
            if result.unreadable and arguments.strict:
                raise ConfigError(f"{result.unreadable[0]} cannot be read as text: repair or --exclude it, or leave out --strict")
            for writer, tokens in zip(writers, result.tokens, strict=True):
                if tokens:
                    writer.add(np.concatenate(tokens), np.array([len(ids) for ids in tokens]))
            text_bytes += result.text_bytes
            empty, unreadable = empty + result.empty, unreadable + result.unreadable
            bar.update(result.size)
        for prefix, writer in zip(prefixes, writers, strict=True):
            if not writer.num_documents:
                raise ConfigError(f"no document went into {prefix}: give more text or another --holdout fraction")
        common = {"tokenizer_digest": info.digest, "vocab_size": info.vocab_size, "end_of_document": info.end_of_document}
        outputs = {
            str(prefix): writer.commit(**common, append_eod=settings.append_eod, bytes=int(size))
            for prefix, writer, size in zip(prefixes, writers, text_bytes, strict=True)
        }
    seconds = time.monotonic() - started
    counts = {"empty": empty, "unreadable": len(unreadable), "unreadable_documents": unreadable[:_LISTED]}
    speed = round(int(text_bytes.sum()) / 1e6 / seconds, 2)
    return {"outputs": outputs, **counts, "seconds": round(seconds, 1), "megabytes_per_second": speed}


def run(arguments: argparse.Namespace) -> dict[str, object]:
    cached_tokenizer(arguments.tokenizer)
    units = make_units(find_text_files(arguments.input, arguments.pattern, arguments.exclude))
    splits = ((arguments.output.name, 0.0), *arguments.holdout)
    return write(arguments, Settings(arguments.tokenizer, splits, arguments.append_eod, arguments.text_key), units)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        summary = run(parse_arguments(arguments))
    except (ConfigError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
