"""Peak memory on a CPU, from the allocator's own log."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that `call` had allocated at one time, beyond what lived before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return most_bytes(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))


def _allocations(roots: list[Any]) -> list[tuple[int, int]]:
    """Address and bytes, negative where freed, of every event of the allocator's log in the order of time."""

    def walk(events: list[Any]) -> Iterator[tuple[int, int, int]]:
        for event in events:
            if event.tag.name == "Allocation":
                yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
            yield from walk(event.children)

    return [(address, size) for _, address, size in sorted(walk(roots), key=lambda each: each[0])]


def most_bytes(log: Iterable[tuple[int, int]]) -> int:
    """Most bytes held at one time, of (address, bytes: negative where freed).

    The profiler sees only its own thread free something. A buffer of a collective is now and then freed by gloo's, and plain sums would
    hold it for ever. So whatever overlaps a new allocation is taken as freed before it. What was there before the log is not counted.
    """
    held: dict[int, int] = {}
    addresses: list[int] = []
    live = peak = 0

    def free(address: int) -> int:
        addresses.pop(bisect_left(addresses, address))
        return held.pop(address)

    for address, size in log:
        if size < 0:
            live -= free(address) if address in held else 0
            continue
        while (below := bisect_left(addresses, address + size)) and addresses[below - 1] + held[
            addresses[below - 1]
        ] > address:
            live -= free(addresses[below - 1])
        held[address] = size
        insort(addresses, address)
        live += size
        peak = max(peak, live)
    return peak
