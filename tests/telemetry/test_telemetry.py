"""megatron_kd.telemetry: single process, but for one two-rank gloo test."""

from __future__ import annotations

import io
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_kd.config.sections import ModelSection
from megatron_kd.planning.flops import (
    flops_per_token,
    peak_tflops,
)
from megatron_kd.planning.parameters import parameter_count
from megatron_kd.telemetry.metrics import METRICS, reduce_reports
from megatron_kd.telemetry.progress_bar import Progress
from megatron_kd.telemetry.run_files import RunWriter
from megatron_kd.telemetry.throughput import Stopwatch, measure_peak_tflops

VERBS = (
    "all_",
    "gather",
    "scatter",
    "broadcast",
    "reduce",
    "barrier",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend",
)
COLLECTIVES = [
    name for name in dir(dist) if name.startswith(VERBS) and callable(getattr(dist, name))
]


class Clock:
    """A clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pair(total: float, count: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([total, count], dtype=dtype)


def test_reduce_divides_once_over_unequal_microbatches() -> None:
    reports = [
        {"total_loss": pair(6.0, 3.0), "ce_loss": pair(2.0, 1.0, torch.float32)},
        {"total_loss": pair(1.0, 1.0)},
        {},
    ]
    before = [{name: value.clone() for name, value in report.items()} for report in reports]
    result = reduce_reports(reports, contribute=True, group=None, device="cpu")
    assert list(result) == [metric.name for metric in METRICS]
    assert result["total_loss"] == 7 / 4  # the mean of means would be 1.5
    assert result["ce_loss"] == 2.0
    assert result["tokens"] == 4.0
    assert result["kd_loss"] is None
    assert all(
        torch.equal(old[name], new[name])
        for old, new in zip(before, reports, strict=True)
        for name in old
    )


def test_reduce_keeps_fp64_precision_and_nan() -> None:
    reports = [{"total_loss": pair(2.0**30 + 0.25, 1.0), "kl": pair(math.nan, 2.0)}] * 4
    result = reduce_reports(reports, contribute=True, group=None, device="cpu")
    assert result["total_loss"] == 2.0**30 + 0.25
    assert math.isnan(result["kl"])


def test_reduce_without_contribution_is_empty() -> None:
    result = reduce_reports(
        [{"total_loss": pair(5.0, 2.0)}], contribute=False, group=None, device="cpu"
    )
    assert result["tokens"] == 0.0
    assert result["total_loss"] is None


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"los": pair(1, 1)}, "unknown metric 'los'"),
        ({"tokens": pair(1, 1)}, "unknown metric 'tokens'"),
        ({"kl": torch.ones(3, dtype=torch.float64)}, r"\[2\]"),
        ({"kl": torch.ones(2, dtype=torch.bfloat16)}, "fp32 or fp64"),
    ],
)
def test_reduce_refuses_a_malformed_report(report: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reduce_reports([report], contribute=True, group=None, device="cpu")


def _count_collectives() -> list[str]:
    """Record every torch.distributed collective called from now on in this process."""
    calls: list[str] = []

    def recording(name: str, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recording(name, getattr(dist, name)))
    return calls


def _reduce_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    calls = _count_collectives()
    mine = [
        [{"total_loss": pair(6, 3), "kd_loss": pair(8, 2)}, {"total_loss": pair(1, 1)}],
        [{"total_loss": pair(10, 2, torch.float32)}],
    ][rank]
    both = reduce_reports(mine, contribute=True, group=dist.group.WORLD, device="cpu")
    calls_per_step = list(calls)
    first = reduce_reports(mine, contribute=rank == 0, group=dist.group.WORLD, device="cpu")
    try:
        reduce_reports(
            [{"oops": pair(1, 1)}] if rank == 1 else mine,
            contribute=True,
            group=dist.group.WORLD,
            device="cpu",
        )
        error = None
    except ValueError as caught:
        error = str(caught)
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({"both": both, "first": first, "calls": calls_per_step, "error": error})
    )
    dist.destroy_process_group()


def test_reduce_on_two_ranks(tmp_path: Path) -> None:
    ranks = mp.spawn(_reduce_on_rank, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 60
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not finish in 60 s"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero["calls"] == one["calls"] == ["all_reduce"]
    assert zero["both"] == one["both"]
    assert zero["first"] == one["first"]
    assert zero["both"]["total_loss"] == 17 / 6
    assert zero["both"]["kd_loss"] == 4.0
    assert zero["both"]["tokens"] == 6.0
    assert zero["both"]["kl"] is None
    assert zero["first"]["total_loss"] == 7 / 4
    assert zero["first"]["tokens"] == 4.0
    assert "oops" in one["error"]
    assert "other rank" in zero["error"]


def section(**changes) -> ModelSection:
    fields = {
        "hidden_size": 48,
        "num_layers": 3,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "head_dim": 16,
        "ffn_hidden_size": 80,
    }
    return ModelSection(**(fields | changes))


def test_flops_are_those_of_the_matrix_products() -> None:
    sequence, vocab = 32, 97
    query, key_value, output, gate_up, down = (
        (48, 6 * 16),
        (48, 2 * 16),
        (6 * 16, 48),
        (48, 80),
        (80, 48),
    )
    layer = [query, key_value, key_value, output, gate_up, gate_up, down]
    matrices = [*layer * 3, (48, vocab)]
    products = sum(2 * sequence * rows * columns for rows, columns in matrices)
    # Scores and values: six heads, every query against every key; a causal model needs half of that.
    attention = 3 * 6 * (2 * sequence * sequence * 16 + 2 * sequence * 16 * sequence) / 2
    expected = (products + attention) / sequence
    assert flops_per_token(section(), vocab, sequence, forward_only=True) == expected
    assert flops_per_token(section(), vocab, sequence) == 3 * expected


def test_flops_default_heads_and_groups() -> None:
    implicit = section(num_query_groups=None, head_dim=None)
    explicit = section(num_query_groups=6, head_dim=8)
    assert flops_per_token(implicit, 97, 32) == flops_per_token(explicit, 97, 32)
    assert parameter_count(implicit, 97) == parameter_count(explicit, 97)


@pytest.mark.parametrize(
    ("shape", "vocab", "published"),
    [  # parameter counts of the released checkpoints
        ((4096, 32, 32, 32, 128, 11008, {}), 32000, 6_738_415_616),  # Llama 2 7B
        ((4096, 32, 32, 8, 128, 14336, {}), 128256, 8_030_261_248),  # Llama 3 8B
        (
            (1024, 28, 16, 8, 128, 3072, {"tied_embeddings": True, "qk_norm": True}),
            151936,
            596_049_920,
        ),  # Qwen3 0.6B
        (
            (896, 24, 14, 2, 64, 4864, {"tied_embeddings": True, "qkv_bias": True}),
            151936,
            494_032_768,
        ),  # Qwen2.5 0.5B
    ],
)
def test_parameter_count_of_released_models(shape: tuple, vocab: int, published: int) -> None:
    hidden, layers, heads, groups, head_dim, ffn, flags = shape
    model = ModelSection(
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=ffn,
        **flags,
    )
    assert parameter_count(model, vocab) == published


PEAKS = {
    312: ["NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"],
    989: ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"],
    756: ["NVIDIA H100 PCIe"],
    835: ["NVIDIA H100 NVL", "NVIDIA H200 NVL"],
    148: ["NVIDIA H20"],
    2250: ["NVIDIA B200"],
    2500: ["NVIDIA GB200"],
    121: ["NVIDIA L4"],
    362: ["NVIDIA L40S"],
    None: ["NVIDIA A10G", "NVIDIA RTX A4000", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
}


@pytest.mark.parametrize(
    ("name", "peak"), [(name, peak) for peak, names in PEAKS.items() for name in names]
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_measured_peak_is_plausible_and_short() -> None:
    start = time.monotonic()
    peak = measure_peak_tflops(torch.float32, seconds=0.05)
    assert time.monotonic() - start < 2
    assert 1e-4 < peak < 1e3


def test_stopwatch_leaves_pauses_out() -> None:
    clock = Clock()
    watch = Stopwatch(flops_per_token=2e9, num_devices=4, peak_tflops=10.0, clock=clock)
    watch.add(600)
    clock.now += 2.0
    with watch.pause():
        clock.now += 50.0
        with watch.pause():
            clock.now += 50.0
        clock.now += 50.0
    watch.add(400)
    clock.now += 3.0
    lap = watch.lap()
    assert (lap.seconds, lap.tokens, lap.tokens_per_second) == (5.0, 1000, 200.0)
    assert lap.tflops_per_device == pytest.approx(200 * 2e9 / 4 / 1e12)
    assert lap.mfu == pytest.approx(0.1 / 10)
    watch.add(10)
    clock.now += 1.0
    assert watch.lap().tokens_per_second == 10.0


def test_stopwatch_goes_on_after_an_error_in_a_pause_and_without_peak() -> None:
    clock = Clock()
    watch = Stopwatch(flops_per_token=1.0, num_devices=1, clock=clock)
    with pytest.raises(RuntimeError), watch.pause():
        clock.now += 7.0
        raise RuntimeError
    clock.now += 1.0
    lap = watch.lap()
    assert lap.seconds == 1.0
    assert lap.mfu is None
    assert watch.lap().tokens_per_second == 0.0


def read_jsonl(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=3)
        writer.row(
            {
                "step": 1,
                "ce_loss": math.nan,
                "grad_norm": math.inf,
                "nested": {"a": [-math.inf, 2.0]},
                "kl": None,
            }
        )
        assert read_jsonl(tmp_path / "run") == [
            {
                "step": 1,
                "ce_loss": None,
                "grad_norm": None,
                "nested": {"a": [None, 2.0]},
                "kl": None,
            }
        ]
        with pytest.raises(ValueError, match="step"):
            writer.row({"ce_loss": 1.0})
    with pytest.raises(RuntimeError, match="begin"):
        writer.row({"step": 2})


def test_resume_drops_newer_rows_and_a_torn_line(tmp_path: Path) -> None:
    with RunWriter(tmp_path, tensorboard=True, enabled=True) as killed:
        killed.begin(step=0, steps=6)
        for step in range(1, 6):
            killed.row({"step": step, "ce_loss": float(step), "kl": math.nan})
            if step in (3, 4):
                killed.row({"step": step, "split": "books", "ce_loss": 10.0 + step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ce_l')
    # Event files are ordered by the second in their name: both attempts of this test may fall in the same one.
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.killed"))
    with RunWriter(tmp_path, tensorboard=True, enabled=True) as resumed:
        resumed.begin(step=3, steps=6)
        for step in range(4, 7):
            resumed.row({"step": step, "ce_loss": 100.0 + step})
    rows = read_jsonl(tmp_path)
    assert [(row["step"], row.get("split"), row["ce_loss"]) for row in rows] == [
        (1, None, 1.0), (2, None, 2.0), (3, None, 3.0), (3, "books", 13.0), (4, None, 104.0), (5, None, 105.0), (6, None, 106.0),
    ]  # fmt: skip
    assert scalars(tmp_path, "train/ce_loss") == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 104.0),
        (5, 105.0),
        (6, 106.0),
    ]
    assert scalars(tmp_path, "validation/books/ce_loss") == [(3, 13.0)]


def test_a_start_at_step_0_keeps_nothing_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "split": "a", "ce_loss": 1.0}\nnonsense\n{"step": 2, "ce_loss": 1.0}\n'
    )
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    with pytest.raises(ValueError, match="line 2 "):
        writer.begin(step=1, steps=2)
    assert "nonsense" in path.read_text()
    writer.begin(step=0, steps=2)
    writer.close()
    assert path.read_text() == ""


def test_status_is_complete_and_checked(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    writer.begin(step=2, steps=9)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    writer.status("failed", step=4, message="loss is not finite")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("time").endswith("+00:00")
    assert status == {"state": "failed", "step": 4, "steps": 9, "message": "loss is not finite"}
    with pytest.raises(ValueError, match="state must be one of"):
        writer.status("done", step=4)
    writer.write_config("[train]\nsteps = 9\n")
    assert (tmp_path / "config.toml").read_text() == "[train]\nsteps = 9\n"
    writer.close()


def test_status_survives_a_failure_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    writer.status("running", step=1)
    before = (tmp_path / "status.json").read_text()
    order: list[str] = []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), real_fsync(fd))[1])

    def refuse(*_: object) -> None:
        order.append("replace")
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        writer.status("finished", step=2)
    assert order == ["fsync", "replace"]
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert (tmp_path / "status.json").read_text() == before


def test_a_disabled_writer_touches_nothing(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", tensorboard=True, enabled=False) as writer:
        writer.begin(step=0, steps=1)
        writer.row({"step": 1})
        writer.status("finished", step=1)
        writer.write_config("x")
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_first_last_and_every_interval() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("auto", steps=200, enabled=True, stream=stream, clock=clock)
    for step in range(1, 201):
        clock.now += 0.5
        progress.update(step, loss=5.123, kd=2.2, tokens_per_second=12345.0)
    lines = stream.getvalue().splitlines()
    progress.close()
    assert stream.getvalue().splitlines() == lines
    assert lines[0] == "step 1/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA --:--:--"
    assert lines[2] == "step 41/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA 00:01:20"
    assert lines[-1] == "step 200/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA 00:00:00"
    assert [line.split("/")[0] for line in lines] == [
        f"step {step}" for step in (*range(1, 200, 20), 200)
    ]


def test_lines_of_a_resumed_run_that_stops_early() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(
        "lines", steps=10_000, start_step=500, enabled=True, stream=stream, clock=clock
    )
    for step in range(501, 504):
        clock.now += (
            1000.0 if step == 501 else 4.0
        )  # the first step compiles; it must not spoil the time left
        progress.update(step, loss=math.nan, tokens_per_second=950.0)
    progress.message("stopped by a signal")
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 501/10000  loss nan  950 tokens/s  ETA --:--:--",
        "stopped by a signal",
        "step 503/10000  loss nan  950 tokens/s  ETA 10:33:08",
    ]


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress("auto", steps=4, enabled=True, stream=stream, clock=Clock())
    for step in range(1, 5):
        progress.update(step, loss=1.5, tokens_per_second=2_500_000.0)
    progress.close()
    assert "\r" in stream.getvalue()
    assert "step 4/4  loss 1.500  2.50M tokens/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "enabled"), [("auto", False), ("bar", False), ("lines", False), ("off", True)]
)
def test_silence(mode: str, enabled: bool, capfd: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    progress = Progress(mode, steps=2, enabled=enabled, stream=stream, clock=Clock())
    progress.update(2, loss=1.0)
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == ""
    assert tuple(capfd.readouterr()) == ("", "")
