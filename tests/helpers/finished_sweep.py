"""Write the folder of a finished sweep, with results that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_kd.sweep.definition.grid import resolve
from megatron_kd.sweep.execution.sweep_record import write_sweep as write_record
from megatron_kd.sweep.execution.task_state import SweepFolder, write_json
from tests.helpers.sweeps import write_sweep

EVIL = "<img src=x onerror=alert(1)> & \\\"q' $x$"
SWEEP = f"""
[sweep]
title = "T <script>alert(1)</script>"
text = "One <b>line</b>.\\n\\nTwo."
seeds = [1, 2, 3]
baseline = "lm"
measure = [["true", "{{run}}"]]
[[cell]]
name = "lm"
run = "student.toml"
[[cell]]
name = "_ alpha {{alpha}} {EVIL}"
group = "alpha"
vary = {{ alpha = [0.0, 0.5, 1.0] }}
run = "student.toml"
overrides = {{ "distill.alpha" = "{{alpha}}" }}
paper = {{ loss = {{ "0.0" = 3.5, "1" = 2.5 }} }}
[[metric]]
name = "loss"
split = "valid"
key = "ce_loss"
unit = "nats"
better = "lower"
[[metric]]
name = "score"
file = "evaluate.json"
key = "results.0.score"
[[plot]]
kind = "curve"
title = "curve"
split = "valid"
key = "ce_loss"
x = "tokens"
[[plot]]
kind = "curve"
title = "long"
key = "ce_loss"
[[plot]]
kind = "bars"
title = "bars"
metric = "score"
[[plot]]
kind = "lines"
title = "lines"
metric = "loss"
x = "alpha"
[[plot]]
kind = "tradeoff"
title = "tradeoff"
x = "loss"
y = "score"
groups = ["alpha"]
[[plot]]
kind = "tradeoff"
title = "points"
file = "evaluate.json"
points = "points"
label = "t"
x = "x"
y = "y"
"""
# Training steps of every run.
STEPS = 250


def loss(cell: int, seed: int) -> float:
    """Return the final loss of a cell by its number."""
    return 4 - 0.5 * cell + 0.01 * seed * (cell + 1)


def write_finished_sweep(folder: Path, text: str = SWEEP) -> Path:
    """Write sweep, records, metrics and measurements; return the folder of the sweep."""
    sweep = resolve(write_sweep(folder / "here", text), folder / "out")
    write_record(sweep, {"commit": "c0ffee", "machine": "two <cores>"})
    for number, cell in enumerate(sweep.cells):
        for seed, task in cell.runs.items():
            run = sweep.out / task.folder
            for step in task.steps:
                content = {"digest": step.digest, "id": "1", "commit": "c0ffee", "machine": "m"}
                (run / "sweep").mkdir(parents=True, exist_ok=True)
                write_json(SweepFolder(sweep.out).record(task, step), content)
            write_json(run / "status.json", {"state": "finished", "step": STEPS})
            lines: list[dict[str, Any]] = [
                {"step": step, "tokens": 10 * step, "ce_loss": 9 / step + loss(number, seed)}
                for step in range(1, STEPS + 1)
            ]
            lines += [
                {"step": step, "split": "valid", "ce_loss": loss(number, seed) + 1 - step / STEPS}
                for step in (125, STEPS)
            ]
            lines += [{"step": STEPS, "split": "other", "ce_loss": 0.0}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            points = [{"t": t, "x": 10 * t + seed, "y": number + t} for t in (0.5, 1.0)]
            write_json(
                run / "evaluate.json",
                {"results": [{"score": number * 10 + seed}], "points": points},
            )
    return sweep.out
