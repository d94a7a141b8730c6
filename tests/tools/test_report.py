"""tools/report.py on synthetic runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.sweep.plots.run_curves import running_mean
from megatron_kd.sweep.results.run_results import read_run
from megatron_kd.telemetry.run_files import RunWriter
from tests.helpers.sweeps import tool

REPORT = Path(__file__).parents[2] / "tools" / "report.py"


def synthetic_run(
    folder: Path, gain: float, *, splits: tuple[str, ...] = ("books",), last_ce: float | None = None
) -> Path:
    with RunWriter(folder, tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=40)
        for step in range(1, 41):
            ce = 3.0 - gain + 6 * math.exp(-step / 5)
            writer.write_metrics(
                {
                    "step": step,
                    "ce_loss": ce,
                    "tokens": step * 1000,
                    "tokens_per_second": 100.0 + step,
                }
            )
            if step % 20 == 0:
                for split in splits:
                    writer.write_metrics(
                        {
                            "step": step,
                            "split": split,
                            "ce_loss": last_ce or math.log(40.0 - gain) + 40 - step,
                            "kd_loss": 0.5,
                        }
                    )
    return folder


def test_numbers_table_and_picture_of_runs(tmp_path: Path) -> None:
    runs = [
        synthetic_run(tmp_path / "plain", 0.0),
        synthetic_run(tmp_path / "distilled", 8.0, splits=("books", "code")),
    ]
    output, numbers = tmp_path / "new" / "out.png", tmp_path / "out.json"
    words = ["--labels", "CE", "KD run", "--output", str(output), "--json", str(numbers)]
    code, text = tool("report", *map(str, runs), *words)
    assert code == 0
    plain, distilled = json.loads(numbers.read_text())
    assert plain["run"] == "CE"
    assert plain["tokens"] == 40_000
    assert plain["median_tokens_per_second"] == 120.5
    assert plain["validation"]["books"]["perplexity"] == pytest.approx(40.0)
    assert plain["validation"]["books"]["step"] == 40
    assert distilled["validation"]["code"]["ce_loss"] == pytest.approx(math.log(32.0))
    lines = text.splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["CE", "3.6889", "40.00", "-", "-", "40,000", "120"]
    header = output.read_bytes()[:24]
    assert header[:4] == b"\x89PNG"
    assert (
        int.from_bytes(header[16:20]),
        int.from_bytes(header[20:24]),
    ) == (1200, 500)


def test_markdown_default_labels_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    runs = [
        synthetic_run(tmp_path / "a" / "seed0", 0.0),
        synthetic_run(tmp_path / "b" / "seed0", 1.0, last_ce=math.nan),
    ]
    words = ["--output", str(tmp_path / "out.svg"), "--markdown"]
    code, text = tool("report", *map(str, runs), *words)
    assert code == 0
    header, rule, first, second = text.splitlines()
    assert header.startswith("| run ")
    assert set(rule) <= set("|-: ")
    assert rule.count(":") == 4
    assert str(runs[0]) in first
    assert str(runs[1]) in second
    assert second.count("not finite") == 2


def test_validation_points_are_placed_by_consumed_tokens(tmp_path: Path) -> None:
    run = read_run(synthetic_run(tmp_path, 0.0), "x")
    assert run.splits["books"].tokens.tolist() == [20_000.0, 40_000.0]


def test_running_mean_is_a_centred_mean() -> None:
    values = np.array([1.0, 5.0, 3.0, 7.0])
    assert running_mean(values, 1).tolist() == values.tolist()
    assert running_mean(values, 3).tolist() == [3.0, 3.0, 5.0, 5.0]


# A training line of metrics.jsonl.
LINE = '{"step": 1, "ce_loss": 2.0, "tokens": 10, "tokens_per_second": 5.0}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        (LINE + '{"step": 2, "ce', "line 2 is not JSON: torn"),
        (LINE + "{]\n" + LINE, "line 2 is not JSON: the file is damaged"),
        ('{"step": 1, "ce_loss": 2.0}\n', "line 1 has no tokens"),
        (LINE.replace("10", "null"), "line 1 has tokens = None"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"step": 1, "split": "a", "ce_loss": 2.0}\n', "validation rows only"),
    ],
)
def test_a_problem_is_reported_in_one_sentence(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    code, error = tool("report", str(tmp_path), "--output", str(tmp_path / "out.png"))
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert error.endswith(".\n")
    assert not (tmp_path / "out.png").exists()


def test_unsuitable_labels_and_outputs_are_refused(tmp_path: Path) -> None:
    run = str(synthetic_run(tmp_path / "run", 0.0))
    code, error = tool("report", run, "--labels", "a", "b", "--output", str(tmp_path / "out.png"))
    assert code == 2
    assert "1 runs, 2 labels" in error
    code, error = tool("report", run, "--output", str(tmp_path / "out.nonsense"))
    assert code == 2
    assert "cannot be written" in error


def test_the_program_needs_no_torch(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", 0.0)
    words = ["report", str(run), "--output", str(tmp_path / "o.png")]
    code = (
        f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {words!r}; "
        f"runpy.run_path({str(REPORT)!r}, run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    process = subprocess.run(
        [sys.executable, str(REPORT), str(tmp_path), "--output", "o.png"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "does not exist" in process.stderr
