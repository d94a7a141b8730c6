"""Test the sweep and the run files of the in-context example without training anything."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_kd.config import ModelSection, load_config
from megatron_kd.planning.memory import peak_rank, run_memory
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.sweep.definition.grid import resolve
from tests.examples.in_context import FOLDER
from tests.helpers.program import ROOT
from tests.helpers.sweeps import sweep


@pytest.mark.parametrize("small", [False, True])
def test_sweep_reads_each_token_once(tmp_path: Path, small: bool) -> None:
    """Check that students read `train` once; SPT-2x reads `more` as well."""
    grid = resolve(FOLDER / "sweep.toml", tmp_path, small=small)
    samples = int(grid.variables["sequences"])
    for cell in grid.cells:
        config = grid.tasks[f"{cell.name}, seed {grid.seeds[0]}"].steps[0].config
        assert config is not None
        num_files = 1 + (cell.name == "SPT-2x")
        assert config.train.steps * config.batch.global_batch_size == num_files * samples
        assert len(config.data.train) == num_files
        assert (config.teacher.source == "cached") == cell.name.startswith("DPT")
    if not small:
        # The shares of routed tokens are the paper's.
        routed = [cell.values["routed"] for cell in grid.cells if "routed" in cell.values]
        assert routed == [0.0, 0.0, 0.15, 0.3]
        assert len(grid.cells) == 6
        assert len(grid.seeds) == 3


def test_commands_of_the_page(tmp_path: Path) -> None:
    """List the tasks of the commands in examples/README.md."""
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        if "in_context" in block
    ]
    small, full, report = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert full[:2] == small[:2] == ["tools/sweep.py", "examples/in_context/sweep.toml"]
    assert report[0] == "tools/report.py"
    for words, tasks in ((small, 4 + 6 * 3), (full, 4 + 6 * 3)):
        code, output = sweep(ROOT / words[1], tmp_path, *words[4:], "--list")
        assert code == 0, output
        assert output.count("open ") == tasks, output
    assert report[1] == full[3]
    assert report[2] == "--html"
    assert full[3] != small[3]


@pytest.mark.parametrize(("name", "teacher"), [("dpt_1b", "llama-3.1-8b"), ("teacher_8b", None)])
def test_paper_sizes(name: str, teacher: str | None) -> None:
    """Check the paper's trillion tokens, and the memory of the 128 devices of 80 GB."""
    config = load_config(["--config", str(FOLDER / f"{name}.toml")])
    tokens_per_step = config.batch.global_batch_size * config.batch.sequence_length
    assert config.train.steps * tokens_per_step == pytest.approx(1e12, rel=1e-5)
    assert config.num_microbatches(128) > 0
    model = None if teacher is None else ModelSection(preset=teacher)
    assert model is None or config.teacher_problem(model, 128) is None
    memory = peak_rank(run_memory(PlannedRun(config, 128256, model), 128)).total
    assert 5 * 2**30 < memory < 70 * 2**30
    script = (FOLDER / f"{name}.sbatch").read_text()
    assert "--nodes=16" in script
    assert "--ntasks-per-node=8" in script
    assert f"train examples/in_context/{name}.toml" in script
    subprocess.run(["bash", "-n", str(FOLDER / f"{name}.sbatch")], check=True, timeout=20)


def test_routing_of_the_papers_student() -> None:
    routing = load_config(["--config", str(FOLDER / "dpt_1b.toml")]).distill.routing
    assert (routing.fraction, routing.scope) == (0.15, "batch")
