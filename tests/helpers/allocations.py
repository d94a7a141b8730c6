"""Measure peak memory on a CPU from the log of the allocator."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory of `call` in bytes, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return most_bytes(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))


def _allocations(roots: list[Any]) -> list[tuple[int, int]]:
    """Return address and bytes of every event of the log, in order; freed bytes are negative."""

    def walk(events: list[Any]) -> Iterator[tuple[int, int, int]]:
        for event in events:
            if event.tag.name == "Allocation":
                yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
            yield from walk(event.children)

    return [(address, size) for _, address, size in sorted(walk(roots), key=lambda event: event[0])]


def most_bytes(log: Iterable[tuple[int, int]]) -> int:
    """Return the peak of allocated bytes of a log of (address, bytes); freed bytes are negative.

    The profiler records only what its own thread frees. Sometimes a thread of gloo frees the buffer
    of a collective, and plain sums would count it for ever. So whatever overlaps a new allocation
    counts as freed. Allocations from before the log are not counted.
    """
    sizes: dict[int, int] = {}
    addresses: list[int] = []
    live = peak = 0

    def free(address: int) -> int:
        addresses.pop(bisect_left(addresses, address))
        return sizes.pop(address)

    for address, size in log:
        if size < 0:
            live -= free(address) if address in sizes else 0
            continue
        while (below := bisect_left(addresses, address + size)) and addresses[below - 1] + sizes[
            addresses[below - 1]
        ] > address:
            live -= free(addresses[below - 1])
        sizes[address] = size
        insort(addresses, address)
        live += size
        peak = max(peak, live)
    return peak
