"""Verify every byte of a run's checkpoints against the digests noted while they were written.

    python tools/verify_checkpoint.py runs/student                    # every step of a run
    python tools/verify_checkpoint.py runs/student/checkpoints/step-00000500 --json  # one step

Sizes and SHA-256 digests are compared; nothing in the files is interpreted, and torch is not
needed. Steps are read newest first, the files of a step by several threads.

Exit codes: 0 every step is intact, 1 a step is damaged or has no digests, 2 bad arguments or
nothing to verify.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_kd.checkpoint.manifest import DamagedCheckpointError, read_manifest, verify
from megatron_kd.checkpoint.store import complete_steps, has_digests, read_info, step_folder
from megatron_kd.config import ConfigError
from megatron_kd.storage.exit_codes import BAD_INPUT


def main(argv: list[str] | None = None) -> int:
    """Verify the checkpoints and print one line per step, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_STEP_FOLDER",
        help="a run directory, its checkpoints folder, or one step-* folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    folders = step_folders(arguments.path)
    if not folders:
        print(
            f"verify_checkpoint: error: no checkpoint at {arguments.path}: name a run directory "
            "or a step-* folder",
            file=sys.stderr,
        )
        return BAD_INPUT
    results = [verify_step(folder) for folder in folders]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(_line(result))
            for problem in result["problems"]:
                print(f"  {problem}")
    return 0 if all(result["state"] == "good" for result in results) else 1


def step_folders(path: Path) -> list[Path]:
    """Return the step folders at `path`, newest first."""
    if any((path / name).exists() for name in ("state.json", "manifest.json", ".metadata")):
        return [path]
    for folder in (path / "checkpoints", path):
        steps = complete_steps(folder)
        if steps:
            return [step_folder(folder, step) for step in reversed(steps)]
    return []


def verify_step(folder: Path) -> dict[str, Any]:
    """Return the result of verifying one step.

    Returns:
        {"folder", "state": "good" | "damaged" | "no digests", "files", "bytes", "seconds",
        "problems"}.
    """
    begin = time.perf_counter()
    result: dict[str, Any] = {"folder": str(folder), "state": "damaged", "files": 0, "bytes": 0}
    try:
        if not has_digests(folder, read_info(folder, setting="checkpoint")):
            return {
                **result,
                "state": "no digests",
                "seconds": 0.0,
                "problems": ["written by an earlier version, without digests"],
            }
        files = read_manifest(folder)
    except (ConfigError, DamagedCheckpointError) as error:
        return {**result, "seconds": 0.0, "problems": [str(error)]}
    result |= {"files": len(files), "bytes": sum(record.bytes for record in files.values())}
    with tqdm(
        total=result["bytes"],
        unit="B",
        unit_scale=True,
        desc=folder.name,
        disable=None,
        leave=False,
    ) as bar:
        problems = verify(folder, progress=bar.update)
    seconds = round(time.perf_counter() - begin, 3)
    return {
        **result,
        "state": "damaged" if problems else "good",
        "seconds": seconds,
        "problems": problems,
    }


def _line(result: dict[str, Any]) -> str:
    rate = result["bytes"] / 1e6 / max(result["seconds"], 1e-3)
    size = (
        f"{result['files']} files, {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s "
        f"({rate:.0f} MB/s)"
    )
    return f"{result['state']:10} {result['folder']}  {size if result['files'] else ''}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
