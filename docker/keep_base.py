"""Write pip constraints that keep the compiled packages of a base image.

    keep_base.py constraints.txt > image_constraints.txt
    keep_base.py --check image_constraints.txt

The torch, NCCL and Transformer Engine of an image were built against each other. If pip would
replace one of them to satisfy a requirement, the build must fail instead.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

# Packages that were compiled together. Other packages of the image may change to the version that
# was tested with this project.
COMPILED = re.compile(
    r"(pytorch[-_])?(torch|triton)([-_].*)?|transformer[-_]engine.*|flash[-_]attn.*"
    r"|apex|nvidia[-_].*|numpy"
)
_PIN = re.compile(r"\s*([A-Za-z0-9._-]+)\s*==")


def installed() -> dict[str, str]:
    """Return the versions of all installed packages by normalized name."""
    return {_normalize(package.metadata["Name"]): package.version for package in distributions()}


def kept(constraints: Iterable[str], versions: dict[str, str]) -> Iterator[str]:
    """Yield the constraints with compiled packages pinned to their installed versions.

    Args:
        constraints: lines of a constraints file.
        versions: installed versions by normalized name.
    """
    compiled = {name: version for name, version in versions.items() if COMPILED.fullmatch(name)}
    for line in constraints:
        pin = _PIN.match(line)
        if pin is None or _normalize(pin[1]) not in compiled:
            yield line
    yield from (f"{name}=={version}" for name, version in sorted(compiled.items()))


def changed(constraints: Iterable[str], versions: dict[str, str]) -> list[str]:
    """Return one sentence for each compiled package whose version differs from its constraint.

    Args:
        constraints: lines that `kept` wrote.
        versions: installed versions by normalized name.
    """
    pins = (
        (_normalize(line.split("==")[0]), line.split("==")[1].strip())
        for line in constraints
        if _PIN.match(line)
    )
    return [
        f"{name} is {versions[name]}, not {version}"
        for name, version in pins
        if COMPILED.fullmatch(name) and name in versions and versions[name] != version
    ]


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str]) -> int:
    """Print constraints, or check them and return 1 if a compiled package has changed."""
    lines = Path(arguments[-1]).read_text(encoding="utf-8").splitlines()
    if arguments[0] != "--check":
        print("\n".join(kept(lines, installed())))
        return 0
    problems = changed(lines, installed())
    for problem in problems:
        print(
            f"keep_base: error: {problem}: the version of the base image was replaced",
            file=sys.stderr,
        )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
