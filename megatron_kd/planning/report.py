"""A plan in words and as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_kd.planning.budget import TIB, Budget
from megatron_kd.planning.hardware import GIB, Cluster
from megatron_kd.planning.memory import PARTS
from megatron_kd.planning.search import Found, Plan
from megatron_kd.planning.step_time import STEP_PARTS

MESSAGES = ("tensor", "pipeline", "data", "exchange")


@dataclass(frozen=True)
class Report:
    """Everything that was found. notes: what was assumed or measured, a sentence each. budget: None without tokens or a teacher."""

    title: str
    found: Found
    cluster: Cluster
    budget: Budget | None
    notes: list[str]
    currency: str = ""


def layout_text(plan: Plan, world_size: int) -> str:
    """`tp2 pp1 dp32 mb4 +sp`: the student's layout in a few letters."""
    config = plan.job.config
    parallel, data = config.parallel, config.data_parallel_size(world_size)
    words = [
        f"tp{parallel.tensor}",
        f"pp{parallel.pipeline}",
        f"dp{data}",
        f"mb{config.batch.micro_batch_size}",
    ]
    words += [f"v{parallel.virtual_pipeline}"] if parallel.virtual_pipeline > 1 else []
    marks = (
        ("sp", parallel.sequence_parallel),
        ("zero1", config.optimizer.distributed),
        ("recompute", config.model.recompute == "full"),
    )
    return " ".join([*words, *(f"+{name}" for name, on in marks if on)])


def teacher_text(plan: Plan, world_size: int) -> str:
    """The teacher's, or where its targets come from."""
    if not plan.job.lives:
        return plan.job.config.teacher.source
    tensor, pipeline, size = plan.job.config.teacher_layout(world_size)
    return (
        f"tp{tensor} pp{pipeline} dp{world_size // (tensor * pipeline)} mb{size}"
        if plan.job.config.teacher.has_separate_layout
        else "same"
    )


def as_numbers(report: Report, show: int) -> dict[str, Any]:
    """What --json prints: seconds, bytes, tokens."""
    ranks = report.cluster.ranks
    return {
        "title": report.title,
        "notes": report.notes,
        "considered": report.found.considered,
        "layouts": [
            {
                "layout": layout_text(plan, ranks),
                "teacher": teacher_text(plan, ranks),
                "overrides": plan.overrides,
                "tokens_per_second": plan.time.tokens_per_second,
                "seconds": {"step": plan.time.seconds, **plan.time.parts},
                "achieved_tflops": plan.time.achieved / 1e12,
                "memory": [
                    {
                        "stage": rank.stage,
                        "total": rank.total,
                        "moment": rank.moment,
                        "parts": rank.parts,
                    }
                    for rank in plan.memory
                ],
            }
            for plan in report.found.plans[:show]
        ],
        "budget": report.budget.as_dict() if report.budget is not None else None,
    }


def as_text(report: Report, show: int) -> str:
    """What is printed for people."""
    plans, ranks = report.found.plans[:show], report.cluster.ranks
    lines = [report.title, *(f"  {note}" for note in report.notes), ""]
    lines.append(
        f"fastest of {report.found.considered} layouts of student and teacher; seconds of a step, GiB of the fullest rank"
    )
    names = ("tokens/s", "step", "student", "teacher", "messages", "bubble", "optim.", "GiB")
    lines.append("    " + "".join(f"{name:>10}" for name in names) + "  student; teacher")
    for number, plan in enumerate(plans, 1):
        parts = plan.time.parts
        messages = sum(parts[name] for name in MESSAGES)
        seconds = (
            plan.time.seconds,
            parts["student"],
            parts["teacher"],
            messages,
            parts["bubble"],
            parts["optimizer"],
        )
        row = f"{number:>3} {plan.time.tokens_per_second:>10,.0f}" + "".join(
            f"{value:>10.3f}" for value in seconds
        )
        layouts = f"{layout_text(plan, ranks)}; {teacher_text(plan, ranks)}"
        lines.append(f"{row}{plan.fullest.total / GIB:>10.1f}  {layouts}")
    lines += ["", *_best(plans[0], report.cluster)]
    if report.budget is not None:
        lines += ["", *_budget(report.budget, report.currency)]
    return "\n".join(lines)


def _best(plan: Plan, cluster: Cluster) -> list[str]:
    used = [name for name in PARTS if any(rank.parts[name] for rank in plan.memory)]
    lines = ["the first of them: GiB on each stage's ranks at their fullest moment"]
    for name in used:
        lines.append(
            f"  {name:20}" + "".join(f"{rank.parts[name] / GIB:>9.2f}" for rank in plan.memory[:8])
        )
    lines.append(
        f"  {'total':20}" + "".join(f"{rank.total / GIB:>9.2f}" for rank in plan.memory[:8])
    )
    lines.append(f"  fullest: {plan.fullest.moment}, stage {plan.fullest.stage}")
    share = f", {plan.time.achieved / cluster.peak:.0%} of the peak" if cluster.peak > 1 else ""
    lines.append(
        f"  student {plan.time.achieved / 1e12:.3g} TFLOP/s a rank{share}, the teacher's time counted and its work not"
    )
    waits = [
        f"{name} {plan.time.parts[name]:.3f}" for name in STEP_PARTS if plan.time.parts[name] > 0
    ]
    lines += [f"  seconds: {', '.join(waits)}", "  run it with"]
    words = plan.overrides
    pairs = [" ".join(words[start : start + 2]) for start in range(0, len(words), 2)]
    return lines + [
        "    " + " ".join(pairs[start : start + 3]) for start in range(0, len(pairs), 3)
    ]


def _budget(found: Budget, currency: str) -> list[str]:
    def price(value: float | None) -> str:
        return "" if value is None else f", {value:,.0f} {currency}".rstrip()

    sized = (
        f"{found.cache_bytes / TIB:.2f} TiB"
        if found.cache_bytes >= TIB / 10
        else f"{found.cache_bytes / GIB:.1f} GiB"
    )
    online, cached = (
        found.students * found.online_hours,
        found.extraction_hours + found.students * found.cached_hours,
    )
    pays = (
        "never pays"
        if found.break_even is None
        else f"costs no more from {found.break_even} student(s) on"
    )
    return [
        f"{found.tokens / 1e9:,.4g} billion tokens, {found.steps:,} steps, {found.students} student(s); GPU-hours and days of this cluster",
        f"  teacher live     {found.online_hours:,.0f} a student ({found.online_days:.1f} days), {found.teacher_hours_online:,.0f} of them "
        f"for the teacher; all students {online:,.0f}{price(found.online_cost)}",
        f"  teacher stored   {found.extraction_hours:,.0f} once ({found.extraction_days:.1f} days), {found.cached_hours:,.0f} a student "
        f"({found.cached_days:.1f} days); all students {cached:,.0f}{price(found.cached_cost)}",
        f"  its cache        {sized} at {found.bytes_per_token:.0f} bytes a token, read at {found.read_bandwidth / 1e6:,.1f} MB/s "
        f"({found.read_bandwidth_per_node / 1e6:,.1f} a node); it {pays}",
    ]
