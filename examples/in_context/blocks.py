"""Pack whole documents into blocks of equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from language import END, IDS, Rng

LOOK_AHEAD = 64  # documents from which the one that fits best is taken


def pack_blocks(
    rng: Rng, kinds: Sequence[Callable[[Rng], list[int]]], count: int, length: int
) -> Iterator[list[int]]:
    """Yield `count` blocks of `length` ids, made of whole documents.

    The longest of the next LOOK_AHEAD documents that fits is taken. The rest of a block is filled
    with <end>.

    Args:
        rng: Generator of the documents.
        kinds: Functions that draw a document; all are called equally often.
        count: Number of blocks.
        length: Ids of a block.

    Raises:
        ValueError: A document is longer than a block.
    """
    waiting: list[list[int]] = []
    for _ in range(count):
        block: list[int] = []
        while True:
            waiting += [
                kinds[kind](rng) for kind in rng.integers(0, len(kinds), LOOK_AHEAD - len(waiting))
            ]
            longest = max(map(len, waiting))
            if longest > length:
                raise ValueError(
                    f"a document has {longest} ids and a block {length}: make blocks longer"
                )
            document = _next_document(waiting, block, length)
            if len(block) + len(document) > length:
                break
            waiting.remove(document)
            block += document
        yield block + [IDS[END]] * (length - len(block))


def _next_document(waiting: list[list[int]], block: list[int], length: int) -> list[int]:
    # The oldest document begins a block, so that none waits for ever.
    if not block:
        return waiting[0]
    free = length - len(block)
    return max(waiting, key=lambda document: len(document) if len(document) <= free else -1)
