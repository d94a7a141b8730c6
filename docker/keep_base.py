"""Constraints for pip that keep what a base image brings: `keep_base.py constraints.txt > ours.txt`, later `keep_base.py --check ours.txt`.

An image's torch, NCCL and Transformer Engine were built against each other. A requirement that pip would rather have another version of
must end the build, not replace one of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

# What was compiled together; other packages of the image may move to the version that was tested with this project.
COMPILED = re.compile(
    r"(pytorch[-_])?(torch|triton)([-_].*)?|transformer[-_]engine.*|flash[-_]attn.*|apex|nvidia[-_].*|numpy"
)
OURS = re.compile(r"\s*([A-Za-z0-9._-]+)\s*==")


def installed() -> dict[str, str]:
    """Versions by normalised name."""
    return {_normal(each.metadata["Name"]): each.version for each in distributions()}


def kept(constraints: Iterable[str], found: dict[str, str]) -> Iterator[str]:
    """The lines of a constraints file with the compiled packages at the versions found, and those of them that it does not name."""
    held = {name: version for name, version in found.items() if COMPILED.fullmatch(name)}
    for line in constraints:
        named = OURS.match(line)
        if named is None or _normal(named[1]) not in held:
            yield line
    yield from (f"{name}=={version}" for name, version in sorted(held.items()))


def changed(constraints: Iterable[str], found: dict[str, str]) -> list[str]:
    """What of the compiled packages is no longer what the constraints say."""
    pinned = (
        (_normal(line.split("==")[0]), line.split("==")[1].strip())
        for line in constraints
        if OURS.match(line)
    )
    return [
        f"{name} is {found[name]}, not {version}"
        for name, version in pinned
        if COMPILED.fullmatch(name) and name in found and found[name] != version
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str]) -> int:
    """Exit code 1 where a compiled package changed."""
    lines = Path(arguments[-1]).read_text(encoding="utf-8").splitlines()
    if arguments[0] != "--check":
        print("\n".join(kept(lines, installed())))
        return 0
    found = changed(lines, installed())
    for sentence in found:
        print(f"keep_base: error: {sentence}: the base image's own was replaced", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
