"""Make a plan: the layouts of a run on a cluster, and the cost of a live or a cached teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_kd.planning.hardware import GIB, Cluster
from megatron_kd.planning.machine_rates import Calibration
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.reports.budget import (
    Budget,
    Prices,
    StepSeconds,
    TrainingPlan,
    assumed_bytes_per_token,
    make_budget,
)
from megatron_kd.planning.reports.plan_text import PlanReport
from megatron_kd.planning.search import LayoutPlan, SearchResult, evaluate, search
from megatron_kd.planning.step_time import ComputeRates


@dataclass(frozen=True)
class TrainingOptions:
    """Hold the options of tools/plan.py that a budget depends on.

    Attributes:
        tokens: tokens of the whole training; None: make no budget.
        students: students that learn from the same teacher and tokens.
        bytes_per_token: size of a cached target; None: from `entries`.
        entries: average kept entries of a token; None: all that [distill] keeps.
        prices: of GPU-hours and storage.
        currency: printed behind prices.
    """

    tokens: float | None = None
    students: int = 1
    bytes_per_token: float | None = None
    entries: float | None = None
    prices: Prices = Prices()
    currency: str = ""


@dataclass(frozen=True)
class Machine:
    """Hold a cluster, the rates of its ranks, and the calibration that they come from."""

    cluster: Cluster
    rates: ComputeRates
    calibration: Calibration | None = None


def make_plan(
    title: str,
    run: PlannedRun,
    machine: Machine,
    training: TrainingOptions,
    *,
    keep_layout: bool = False,
) -> PlanReport:
    """Return the plan of a run.

    Args:
        title: first line of the report.
        run: the run.
        machine: the cluster and its rates.
        training: tokens, students and prices.
        keep_layout: evaluate the layout of the run file and no other.

    Raises:
        ConfigError: if no layout is possible, or none fits in memory.
    """
    cluster, rates = machine.cluster, machine.rates
    if keep_layout:
        plan = evaluate(run, cluster, rates)
        result = SearchResult([plan], 1, plan)
    else:
        result = search(run, cluster, rates)
    budget = None
    # Dense targets cannot be stored.
    if training.tokens and run.teacher is not None and not run.config.distill.dense:
        budget = _budget(run, machine, training, training.tokens, result.plans[0])
    return PlanReport(title, result, cluster, budget, _notes(run, machine), training.currency)


def _notes(run: PlannedRun, machine: Machine) -> list[str]:
    """Return the assumptions and measurements of a plan, one sentence each."""
    cluster, rates, batch = machine.cluster, machine.rates, run.config.batch
    tokens = batch.global_batch_size * batch.sequence_length
    notes = [
        f"{batch.global_batch_size} sequences of {batch.sequence_length} tokens a step "
        f"({tokens / 1e6:.2f} million tokens)"
    ]
    if machine.calibration is None:
        notes.append(
            f"assumed: student {rates.student / 1e12:.0f}, teacher {rates.teacher / 1e12:.0f} "
            f"TFLOP/s a GPU while they compute; links {cluster.intra / 1e9:.0f} GB/s in a node, "
            f"{cluster.inter / 1e9:.0f} GB/s between; {cluster.framework / GIB:g} GiB framework"
        )
    else:
        settings = machine.calibration.settings
        notes.append(
            f"measured ({machine.calibration.device}, student {settings['hidden']} wide, teacher "
            f"{settings['teacher_hidden']}): student {rates.student / 1e9:,.0f}, teacher "
            f"{rates.teacher / 1e9:,.0f} GFLOP/s a rank while they compute; link "
            f"{cluster.intra / 1e9:.2f} GB/s, {cluster.latency * 1e6:.0f} microseconds"
        )
    notes.append(
        "not in it: data loading, evaluation, checkpoints, failures; activations of the GPU's "
        "fused layers are a model, not a measurement"
    )
    return notes


def _budget(
    run: PlannedRun,
    machine: Machine,
    training: TrainingOptions,
    tokens: float,
    best: LayoutPlan,
) -> Budget:
    """Return the cost of the best layout with a live teacher, and of the best with a cached one.

    The teacher alone fills the cache, and the student alone reads it.
    """
    cluster, rates = machine.cluster, machine.rates
    online = best
    if not run.has_live_teacher:
        online = search(_with_teacher(run, source="online"), cluster, rates).plans[0]
    cached_run = _with_teacher(run, source="cached", cache="none", on_miss="error")
    cached = search(cached_run, cluster, rates, keep=1).plans[0]
    teacher = online.time.parts["teacher"]
    seconds = StepSeconds(
        tokens=online.time.tokens,
        online=online.time.seconds,
        teacher=teacher + online.time.parts["exchange"],
        cached=cached.time.seconds,
        extraction=teacher,
    )
    plan = TrainingPlan(
        tokens=tokens,
        students=training.students,
        bytes_per_token=training.bytes_per_token
        or assumed_bytes_per_token(run.config, training.entries),
        readers=cached.run.config.parallel.tensor,
    )
    return make_budget(seconds, cluster, plan, training.prices)


def _with_teacher(run: PlannedRun, **values: str) -> PlannedRun:
    """Return the run with other values of its [teacher] section."""
    teacher = run.config.teacher.model_copy(update=values)
    return replace(run, config=run.config.model_copy(update={"teacher": teacher}))
