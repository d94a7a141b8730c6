"""Measure a student of the bigram sandbox on held-out sequences, checkpoint by checkpoint.

    python examples/bigram_sandbox/measure.py RUN DATA --json OUT

DATA is the folder that prepare.py wrote. For every checkpoint of the run:

* the error of each kind of row: total variation distance from the chain's probabilities, mean over
  tokens; 0 is perfect;
* how often the most probable id after a trigger is its output, from the trigger's second occurrence
  in a sequence on.

Also the number of tokens after which these reached a level. It is that of the whole run where they
never did.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from chain import Chain, Floats, Ids, next_id_probabilities

from megatron_kd.config import ParallelSection
from megatron_kd.parallel.platform import start_platform
from megatron_kd.storage.atomic_files import write_atomically

BATCH_SIZE = 64  # sequences of one forward pass


def main() -> None:
    """Measure every checkpoint and write the result."""
    arguments = _parser().parse_args()
    description = json.loads((arguments.data / "chain.json").read_text())
    chain = Chain(
        np.array(description["rows"]),
        np.array([kind == "high" for kind in description["kind"]]),
        np.array(description["triggers"]),
    )
    with np.load(arguments.data / "heldout.npz") as heldout:
        tokens, outputs = heldout["tokens"], heldout["outputs"]
    points = [
        measure(chain, tokens, outputs, probabilities, step)
        for step, probabilities in checkpoint_probabilities(arguments.run, tokens)
    ]
    per_step = tokens_per_step(arguments.run)
    for point in points:
        point["tokens"] = point["step"] * per_step
    result: dict[str, Any] = {
        **points[-1],
        "tokens_to_copy": tokens_to_reach(points, "copied", arguments.half),
        "tokens_to_rows": tokens_to_reach(points, "high", arguments.error),
        "points": points,
    }
    write_atomically(arguments.json, json.dumps(result, indent=1).encode())


def tokens_per_step(run: Path) -> int:
    """Return the number of training tokens of one step of the run."""
    batch = tomllib.loads((run / "config.toml").read_text())["batch"]
    return int(batch["global_batch_size"] * batch["sequence_length"])


def checkpoint_probabilities(run: Path, tokens: Ids) -> Iterator[tuple[int, Floats]]:
    """Yield the step and the student's probabilities, fp64 [N, S, V], of each checkpoint in order.

    Args:
        run: Directory of the run.
        tokens: Sequences, int64 [N, S].
    """
    platform = start_platform("cpu")
    # The platform must be prepared before megatron-core is imported.
    from megatron_kd.checkpoint.store import complete_steps, read_info, step_folder
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.parallel.groups import start_groups, stop_groups

    layout = ParallelSection()
    groups = start_groups(platform, layout, timeout_seconds=600)
    try:
        for step in complete_steps(run / "checkpoints"):
            folder = step_folder(run / "checkpoints", step)
            info = read_info(folder, setting="run")
            model = FrozenModel(
                folder, info, groups, layout, precision="fp32", sequence_length=tokens.shape[1]
            )
            batches = []
            for batch in torch.from_numpy(tokens).split(BATCH_SIZE):
                hidden = model.hidden(batch)
                assert hidden is not None
                batches.append(model.logits(hidden).transpose(0, 1).double().softmax(-1))
            yield step, torch.cat(batches).numpy()
    finally:
        stop_groups()


def measure(chain: Chain, tokens: Ids, outputs: Ids, student: Floats, step: int) -> dict[str, Any]:
    """Return the error of each kind of row, and the accuracy after repeated triggers.

    Args:
        chain: Chain that the tokens were sampled from.
        tokens: Sequences, int64 [N, S].
        outputs: Output of each trigger in each sequence, int64 [N, T].
        student: Probabilities of the student, fp64 [N, S, V].
        step: Step of the checkpoint.
    """
    truth = next_id_probabilities(chain, tokens, outputs)
    distance = 0.5 * np.abs(student - truth).sum(-1)
    kinds = np.array(chain.kinds)[tokens]
    point: dict[str, Any] = {
        "step": step,
        **{name: float(distance[kinds == name].mean()) for name in ("high", "low")},
    }
    # True for triggers that occurred before in their sequence.
    repeated = np.zeros(tokens.shape, dtype=bool)
    for trigger in chain.triggers:
        repeated |= (tokens == trigger) & ((tokens == trigger).cumsum(1) > 1)
    output = truth.argmax(-1)
    copied = student.argmax(-1) == output
    probability = np.take_along_axis(student, output[..., None], -1)[..., 0]
    point["copied"] = float(copied[repeated].mean())
    point["probability_of_copy"] = float(probability[repeated].mean())
    return point


def tokens_to_reach(points: list[dict[str, Any]], name: str, level: float) -> float:
    """Return the number of tokens at which an accuracy rose to `level`, or an error fell to it.

    Values between two checkpoints lie on a straight line. If no checkpoint reaches the level, the
    result is the number of tokens of the whole run, a lower bound.

    Args:
        points: Measurements of the checkpoints, in order.
        name: Key of the value: "copied", an accuracy, or else an error.
        level: Value to reach.
    """
    sign = 1.0 if name == "copied" else -1.0
    last, value = 0.0, 0.0 if name == "copied" else 1.0
    for point in points:
        if sign * (point[name] - level) >= 0:
            share = (level - value) / (point[name] - value)
            return float(last + share * (point["tokens"] - last))
        last, value = point["tokens"], point[name]
    return float(points[-1]["tokens"])


def _parser() -> argparse.ArgumentParser:
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
    return parser


if __name__ == "__main__":
    main()
