"""Measure gradients, memory and time of the losses of an output head."""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_kd.storage.provenance import commit

from . import head_registry
from .harness import paired_ratios, spread
from .head_reference import ReferenceGradients, make_inputs
from .head_variants import NO_GRADIENT, Call, HeadInputs, HeadVariant, Unavailable


@dataclass
class VariantRunner:
    """Hold one variant that is ready to run, and what is reported about it."""

    variant: HeadVariant
    call: Call
    inputs: HeadInputs
    report: dict[str, Any]
    main_grad: Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self) -> Any:
        """Run forward and backward.

        Returns:
            Gradients of hidden states [N, H] and weight [V, H]; the result of the call for what
            has no gradient.
        """
        inputs = self.inputs
        if self.variant.computes in NO_GRADIENT:
            return self.call(inputs, inputs.hidden, inputs.weight)
        hidden, weight = (
            tensor.detach().requires_grad_() for tensor in (inputs.hidden, inputs.weight)
        )
        if self.main_grad is None:
            return torch.autograd.grad(self.call(inputs, hidden, weight), (hidden, weight))
        weight.main_grad = self.main_grad
        hidden_gradient, _ = torch.autograd.grad(
            self.call(inputs, hidden, weight), (hidden, weight)
        )
        return hidden_gradient, self.main_grad

    def check(self, reference: ReferenceGradients, limit: float) -> None:
        """Run once, and report the errors of the gradients and the peak memory."""
        if self.variant.main_grad:
            self.main_grad = torch.zeros_like(self.inputs.weight, dtype=torch.float32)
        result, self.report["peak_bytes"] = _peak(self.run, self.inputs.hidden.device)
        errors = reference.errors(self.variant, result)
        self.report["error"], self.report["limit"] = errors, limit
        largest = max(errors.values(), default=0.0)
        # A comparison with NaN is false, and NaN must not pass.
        if not largest <= limit:
            self.report |= {
                "status": "wrong gradient",
                "reason": f"wrong gradient: error {largest:.1e}, limit {limit:.1e}",
            }

    def time(self) -> None:
        """Measure one run. On a GPU another comes first, because the allocator's cache is empty."""
        on_gpu = self.inputs.hidden.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            self.run()
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.run()
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def guard(self, step: Callable[[], None]) -> None:
        """Run `step` and report if it fails."""
        try:
            step()
        except torch.OutOfMemoryError:
            self.report |= {"status": "out of memory", "reason": "out of memory"}
        # Another library may fail in any way; the other variants are measured all the same.
        except Exception as error:
            first, *_ = [*str(error).splitlines(), ""]
            reason = f"failed: {type(error).__name__}: {first}"
            self.report |= {"status": "failed", "reason": reason}


def _peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return the result of `call`, and its peak memory beyond what was allocated before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, check and time the variants.

    Args:
        arguments: The parsed options.

    Returns:
        The result for JSON.
    """
    was_initialized = dist.is_initialized()
    torch.manual_seed(arguments.seed)
    reports, runners = _prepare(arguments, make_inputs(arguments))
    _show_progress("gradients in fp64")
    names = {runner.variant.computes for runner in runners} - set(NO_GRADIENT)
    if runners:
        _check_and_time(arguments, runners, names)
    if dist.is_initialized() and not was_initialized:
        dist.destroy_process_group()
    _show_progress("")
    _summarize(runners)
    return _result(arguments, reports)


def _check_and_time(
    arguments: argparse.Namespace, runners: list[VariantRunner], names: set[str]
) -> None:
    reference = ReferenceGradients.compute(runners[0].inputs, names)
    for runner in runners:
        _show_progress(f"checking {runner.variant.name}")
        limit = runner.variant.limit(arguments.dtype, arguments.near)
        runner.guard(lambda runner=runner, limit=limit: runner.check(reference, limit))
    for index in range(arguments.rounds):
        _show_progress(f"round {index + 1} of {arguments.rounds}")
        for runner in runners:
            if runner.report["status"] == "measured":
                runner.guard(runner.time)


def _prepare(
    arguments: argparse.Namespace, inputs: HeadInputs
) -> tuple[list[dict[str, Any]], list[VariantRunner]]:
    """Return the reports of all selected variants, and the runners of those that can run."""
    reports, runners = [], []
    for variant in head_registry.VARIANTS:
        if arguments.only and variant.name not in arguments.only:
            continue
        report: dict[str, Any] = {
            "name": variant.name,
            "computes": variant.computes,
            "teacher": variant.teacher,
            "own": variant.internal,
            "status": "measured",
            "reason": "",
            "seconds": None,
            "ratio": {},
            "peak_bytes": None,
            "error": {},
            "limit": None,
        }
        reports.append(report)
        try:
            call = variant.prepare(inputs.hidden.device)
            runners.append(VariantRunner(variant, call, inputs, report))
        except Unavailable as reason:
            report |= {"status": "unavailable", "reason": str(reason)}
    return reports, runners


def _summarize(runners: list[VariantRunner]) -> None:
    """Report spreads, and ratios to the baselines that are formed within rounds."""
    measured = {
        runner.variant.name: runner for runner in runners if runner.report["status"] == "measured"
    }
    for runner in measured.values():
        runner.report["seconds"] = spread(runner.seconds)
        for name in (head_registry.BASELINE, head_registry.PLAIN, head_registry.PRODUCT):
            if name in measured:
                ratios = paired_ratios(runner.seconds, measured[name].seconds)
                runner.report["ratio"][name] = spread(ratios)


def _result(arguments: argparse.Namespace, reports: list[dict[str, Any]]) -> dict[str, Any]:
    on_gpu = arguments.device == "cuda"
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **head_registry.package_versions(),
            "cuda": torch.version.cuda if on_gpu else None,
        },
        "options": vars(arguments),
        "variants": reports,
    }


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
