"""What a student of the bigram sandbox has learned, checkpoint by checkpoint, on held-out sequences.

    python examples/bigram_sandbox/measure.py RUN DATA --json OUT

DATA: the folder of prepare.py. For every checkpoint of the run: the error of each kind of row (total variation distance from the chain's
own probabilities, mean over tokens: 0 is perfect), and how often the likeliest id after a trigger is its output, from the trigger's second
occurrence in a sequence on. And the tokens after which these had come to a given level; the whole run's where they never did.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from chain import Chain, Floats, Ids, next_ids

from megatron_kd.config import ParallelSection
from megatron_kd.parallel.platform import start_platform
from megatron_kd.storage.atomic_files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("data", type=Path, help="folder of prepare.py")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--half",
        type=float,
        default=0.5,
        help="accuracy after triggers that counts as having learned to copy (0.5)",
    )
    parser.add_argument(
        "--error",
        type=float,
        default=0.15,
        help="error of high-entropy rows that counts as having learned them (0.15)",
    )
    arguments = parser.parse_args()
    about = json.loads((arguments.data / "chain.json").read_text())
    chain = Chain(
        np.array(about["rows"]),
        np.array([kind == "high" for kind in about["kind"]]),
        np.array(about["triggers"]),
    )
    with np.load(arguments.data / "heldout.npz") as held:
        tokens, outputs = held["tokens"], held["outputs"]
    kinds = about["kind"]
    points = [
        measure(chain, tokens, outputs, kinds, said, step)
        for step, said in every_checkpoint(arguments.run, tokens)
    ]
    per_step = int(tokens_per_step(arguments.run))
    for point in points:
        point["tokens"] = point["step"] * per_step
    found: dict[str, Any] = {
        **points[-1],
        "tokens_to_copy": reached(points, "copied", arguments.half),
        "tokens_to_rows": reached(points, "high", arguments.error),
        "points": points,
    }
    write_atomically(arguments.json, json.dumps(found, indent=1).encode())


def tokens_per_step(run: Path) -> int:
    import tomllib

    batch = tomllib.loads((run / "config.toml").read_text())["batch"]
    return int(batch["global_batch_size"] * batch["sequence_length"])


def every_checkpoint(run: Path, tokens: Ids) -> Any:
    """(step, probabilities fp64 [N, S, V]) of each checkpoint, in order."""
    platform = start_platform("cpu")
    from megatron_kd.checkpoint.store import complete_steps, read_info, step_folder
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.parallel.groups import start_groups, stop_groups

    layout = ParallelSection()
    groups = start_groups(platform, layout, timeout_seconds=600)
    try:
        for step in complete_steps(run / "checkpoints"):
            folder = step_folder(run / "checkpoints", step)
            info = read_info(folder, what="run")
            model = FrozenModel(
                folder, info, groups, layout, precision="fp32", sequence_length=tokens.shape[1]
            )
            parts = []
            for part in torch.from_numpy(tokens).split(64):
                hidden = model.hidden(part)
                assert hidden is not None
                parts.append(model.logits(hidden).transpose(0, 1).double().softmax(-1))
            yield step, torch.cat(parts).numpy()
    finally:
        stop_groups()


def measure(
    chain: Chain, tokens: Ids, outputs: Ids, kinds: list[str], student: Floats, step: int
) -> dict[str, Any]:
    """Errors by kind of row, and accuracy after triggers that have been seen before in the sequence."""
    truth = next_ids(chain, tokens, outputs)
    apart = 0.5 * np.abs(student - truth).sum(-1)
    kind = np.array(kinds)[tokens]
    found: dict[str, Any] = {
        "step": step,
        **{name: float(apart[kind == name].mean()) for name in ("high", "low")},
    }
    seen = np.zeros(tokens.shape, dtype=bool)
    for trigger in chain.triggers:
        seen |= (tokens == trigger) & ((tokens == trigger).cumsum(1) > 1)
    right = student.argmax(-1) == truth.argmax(-1)
    found["copied"] = float(right[seen].mean())
    found["probability_of_copy"] = float(
        np.take_along_axis(student, truth.argmax(-1)[..., None], -1)[..., 0][seen].mean()
    )
    return found


def reached(points: list[dict[str, Any]], name: str, level: float) -> float:
    """Tokens at which an accuracy first rose to `level`, or an error fell to it, on a straight line between two checkpoints.

    At a level that no checkpoint reaches: the tokens of the whole run, a lower bound.
    """
    sign = 1.0 if name == "copied" else -1.0
    last, value = 0.0, 0.0 if name == "copied" else 1.0
    for point in points:
        if sign * (point[name] - level) >= 0:
            share = (level - value) / (point[name] - value)
            return float(last + share * (point["tokens"] - last))
        last, value = point["tokens"], point[name]
    return float(points[-1]["tokens"])


if __name__ == "__main__":
    main()
