"""Write a plan as text and as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_kd.planning.hardware import GIB, Cluster
from megatron_kd.planning.memory import PARTS
from megatron_kd.planning.reports.budget import TIB, Budget
from megatron_kd.planning.search import LayoutPlan, SearchResult
from megatron_kd.planning.step_time import STEP_PARTS

# Parts of a step that are messages between ranks.
MESSAGES = ("tensor", "pipeline", "data", "exchange")


@dataclass(frozen=True)
class PlanReport:
    """Hold everything that a plan found.

    Attributes:
        title: first line of the report.
        result: the layouts.
        cluster: the machine.
        budget: costs of the whole training; None without tokens or a teacher.
        notes: assumptions and measurements, one sentence each.
        currency: printed behind prices.
    """

    title: str
    result: SearchResult
    cluster: Cluster
    budget: Budget | None
    notes: list[str]
    currency: str = ""


def layout_text(plan: LayoutPlan, world_size: int) -> str:
    """Return the student's layout in a few letters: `tp2 pp1 dp32 mb4 +sp`."""
    config = plan.run.config
    parallel, data = config.parallel, config.data_parallel_size(world_size)
    sizes = [
        f"tp{parallel.tensor}",
        f"pp{parallel.pipeline}",
        f"dp{data}",
        f"mb{config.batch.micro_batch_size}",
    ]
    sizes += [f"v{parallel.virtual_pipeline}"] if parallel.virtual_pipeline > 1 else []
    marks = {
        "+sp": parallel.sequence_parallel,
        "+zero1": config.optimizer.distributed,
        "+recompute": config.model.recompute == "full",
    }
    return " ".join([*sizes, *(mark for mark, is_on in marks.items() if is_on)])


def teacher_text(plan: LayoutPlan, world_size: int) -> str:
    """Return the teacher's layout in a few letters, or the source of its targets."""
    config = plan.run.config
    if not plan.run.has_live_teacher:
        return config.teacher.source
    if not config.teacher.has_separate_layout:
        return "same"
    tensor, pipeline, size = config.teacher_layout(world_size)
    return f"tp{tensor} pp{pipeline} dp{world_size // (tensor * pipeline)} mb{size}"


def as_numbers(report: PlanReport, num_layouts: int) -> dict[str, Any]:
    """Return the report in seconds, bytes and tokens, as --json prints it.

    Args:
        report: the plan.
        num_layouts: number of layouts to include.
    """
    ranks = report.cluster.ranks
    return {
        "title": report.title,
        "notes": report.notes,
        "considered": report.result.considered,
        "layouts": [_layout_numbers(plan, ranks) for plan in report.result.plans[:num_layouts]],
        "budget": report.budget.as_dict() if report.budget is not None else None,
    }


def _layout_numbers(plan: LayoutPlan, ranks: int) -> dict[str, Any]:
    return {
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


def as_text(report: PlanReport, num_layouts: int) -> str:
    """Return the report as text: a table of layouts, the first one in detail, and the budget.

    Args:
        report: the plan.
        num_layouts: number of layouts in the table.
    """
    plans = report.result.plans[:num_layouts]
    lines = [report.title, *(f"  {note}" for note in report.notes), ""]
    lines.append(
        f"fastest of {report.result.considered} layouts of student and teacher; seconds of a step, "
        "peak GiB of any rank"
    )
    names = ("tokens/s", "step", "student", "teacher", "messages", "bubble", "optim.", "GiB")
    lines.append("    " + "".join(f"{name:>10}" for name in names) + "  student; teacher")
    for number, plan in enumerate(plans, 1):
        lines.append(f"{number:>3} {_table_line(plan, report.cluster.ranks)}")
    lines += ["", *_detail_lines(plans[0], report.cluster)]
    if report.budget is not None:
        lines += ["", *_budget_lines(report.budget, report.currency)]
    return "\n".join(lines)


def _table_line(plan: LayoutPlan, ranks: int) -> str:
    parts = plan.time.parts
    seconds = (
        plan.time.seconds,
        parts["student"],
        parts["teacher"],
        sum(parts[name] for name in MESSAGES),
        parts["bubble"],
        parts["optimizer"],
    )
    columns = "".join(f"{value:>10.3f}" for value in seconds)
    layouts = f"{layout_text(plan, ranks)}; {teacher_text(plan, ranks)}"
    memory = plan.peak.total / GIB
    return f"{plan.time.tokens_per_second:>10,.0f}{columns}{memory:>10.1f}  {layouts}"


def _detail_lines(plan: LayoutPlan, cluster: Cluster) -> list[str]:
    stages = plan.memory[:8]
    lines = ["fastest layout: peak GiB of each stage's ranks"]
    for name in PARTS:
        if any(rank.parts[name] for rank in plan.memory):
            values = "".join(f"{rank.parts[name] / GIB:>9.2f}" for rank in stages)
            lines.append(f"  {name:20}{values}")
    totals = "".join(f"{rank.total / GIB:>9.2f}" for rank in stages)
    lines.append(f"  {'total':20}{totals}")
    lines.append(f"  peak: {plan.peak.moment}, stage {plan.peak.stage}")
    share = f", {plan.time.achieved / cluster.peak:.0%} of the peak" if cluster.peak > 1 else ""
    lines.append(
        f"  student {plan.time.achieved / 1e12:.3g} TFLOP/s a rank{share}, the teacher's time "
        "counted and its work not"
    )
    seconds = [
        f"{name} {plan.time.parts[name]:.3f}" for name in STEP_PARTS if plan.time.parts[name] > 0
    ]
    lines += [f"  seconds: {', '.join(seconds)}", "  run it with"]
    words = plan.overrides
    pairs = [" ".join(words[start : start + 2]) for start in range(0, len(words), 2)]
    for start in range(0, len(pairs), 3):
        lines.append("    " + " ".join(pairs[start : start + 3]))
    return lines


def _budget_lines(budget: Budget, currency: str) -> list[str]:
    def price(value: float | None) -> str:
        return "" if value is None else f", {value:,.0f} {currency}".rstrip()

    if budget.cache_bytes >= TIB / 10:
        cache_size = f"{budget.cache_bytes / TIB:.2f} TiB"
    else:
        cache_size = f"{budget.cache_bytes / GIB:.1f} GiB"
    online = budget.students * budget.online_hours
    cached = budget.extraction_hours + budget.students * budget.cached_hours
    if budget.break_even is None:
        verdict = "never pays"
    else:
        verdict = f"costs no more from {budget.break_even} student(s) on"
    return [
        f"{budget.tokens / 1e9:,.4g} billion tokens, {budget.steps:,} steps, {budget.students} "
        "student(s); GPU-hours and days of this cluster",
        f"  teacher live     {budget.online_hours:,.0f} a student ({budget.online_days:.1f} days), "
        f"{budget.teacher_hours_online:,.0f} of them for the teacher; all students {online:,.0f}"
        f"{price(budget.online_cost)}",
        f"  teacher stored   {budget.extraction_hours:,.0f} once ({budget.extraction_days:.1f} "
        f"days), {budget.cached_hours:,.0f} a student ({budget.cached_days:.1f} days); all "
        f"students {cached:,.0f}{price(budget.cached_cost)}",
        f"  its cache        {cache_size} at {budget.bytes_per_token:.0f} bytes a token, read at "
        f"{budget.read_bandwidth / 1e6:,.1f} MB/s ({budget.read_bandwidth_per_node / 1e6:,.1f} a "
        f"node); it {verdict}",
    ]
