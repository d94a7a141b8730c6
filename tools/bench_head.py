"""Time, memory and gradient error of the output head and its loss: this project's, plain torch's and other libraries'.

    python tools/bench_head.py                                   # a few minutes on a CPU
    python tools/bench_head.py --only megatron-fused-ce,head-chunk --json
    python tools/bench_head.py --near 0.1 --dtype bf16 --output head.json

From the student's final hidden states and output weight to the gradients of both: one process, the same inputs, in turn, round
after round; ratios are formed within a round. The student is the teacher plus a little noise (--near), as late in training,
where rounded logits cost most. A variant whose gradient is further from its own loss in fp64 than its limit gets no time.
Memory is the most that was allocated at one time beyond the inputs; both gradients are part of it, but for head-direct, which
adds the weight's to a buffer that megatron-core has anyway. A library that is not installed is left out, with a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_peers as peers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_peers import (
    NO_GRADIENT,
    TOP_K_LOSS,
    VARIANTS,
    Call,
    Inputs,
    Unavailable,
    Variant,
    versions,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_kd.storage.provenance import commit
from megatron_kd.targets import SparseTarget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULTS = {
    "cpu": {"tokens": 2048, "hidden": 512, "vocab": 32768, "dtype": "fp32"},
    "cuda": {"tokens": 8192, "hidden": 4096, "vocab": 128256, "dtype": "bf16"},
}
# Gradients are compared on at most so many tokens and rows of the weight; all tokens take part in the latter.
CHECKED_TOKENS, CHECKED_ROWS = 256, 2048
# Standard deviation of the logits, and logits of one chunk in fp64.
LOGIT_SPREAD, CHUNK = 4.8, 1 << 23


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print a table, or JSON. 1 where a variant of this project has a wrong gradient."""
    arguments = _arguments(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    result = measure(arguments)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return int(
        any(
            row["own"] and row["status"] in ("wrong gradient", "failed")
            for row in result["variants"]
        )
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of hidden states and weights (CPU: fp32, CUDA: bf16)"
    )
    parser.add_argument("--tokens", type=int, help="CPU: 2048, CUDA: 8192")
    parser.add_argument("--hidden", type=int, help="width of the student (CPU: 512, CUDA: 4096)")
    parser.add_argument("--teacher-hidden", type=int, help="width of the teacher (the student's)")
    parser.add_argument("--vocab", type=int, help="CPU: 32768, CUDA: 128256")
    parser.add_argument("--top-k", type=int, default=64, help="kept entries of the teacher")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.5,
        help="weight of the distillation loss where there is a cross-entropy too",
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.02,
        help="standard deviation of the student's logits from the teacher's",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="measured rounds; one more comes first, for gradients and memory",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument(
        "--only",
        default="",
        help=f"names, with commas between: {', '.join(v.name for v in VARIANTS)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.teacher_hidden = arguments.teacher_hidden or arguments.hidden
    arguments.only = [name for name in arguments.only.split(",") if name]
    unknown = set(arguments.only) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"--only: no variant {', '.join(sorted(unknown))}")
    if (
        min(arguments.tokens, arguments.hidden, arguments.teacher_hidden, arguments.rounds) < 1
        or arguments.near <= 0
    ):
        parser.error(
            "--tokens, --hidden, --teacher-hidden and --rounds must be at least 1, --near above 0"
        )
    if not 1 <= arguments.top_k < arguments.vocab:
        parser.error("--top-k must be at least 1 and below --vocab")
    return arguments


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1)


def _jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_kl(log_q, log_m) + _kl(log_p, log_m))


# Distance [C] of the student's logits z [C, V] from the teacher's t, or from its kept ids and their log-probabilities [C, K].
DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "KL(top-k || p)": lambda z, t, ids, kept: _kl(kept, z.log_softmax(1).gather(1, ids)),
    "KL within top-k": lambda z, t, ids, kept: _kl(kept, z.gather(1, ids).log_softmax(1)),
    "KL": lambda z, t, ids, kept: _kl(t.log_softmax(1), z.log_softmax(1)),
    "JSD": lambda z, t, ids, kept: _jensen_shannon(t.log_softmax(1), z.log_softmax(1)),
    "cosine": lambda z, t, ids, kept: 1.0 - F.cosine_similarity(z, t),
}


def token_loss(
    name: str, z: Tensor, t: Tensor, labels: Tensor, target: SparseTarget, alpha: float
) -> Tensor:
    """The loss a variant `computes`, written plainly: [C] from logits [C, V] of student and teacher. Kept entries are rescaled to 1."""
    hard = F.cross_entropy(z, labels, reduction="none") if name.startswith("CE") else None
    if name == "CE":
        return hard
    soft = DISTANCES[name.removeprefix("CE + ")](
        z, t, target.indices.long(), target.logprobs.to(z.dtype).log_softmax(1)
    )
    return soft if hard is None else (1.0 - alpha) * hard + alpha * soft


def make_inputs(arguments: argparse.Namespace) -> Inputs:
    """Random inputs. Teacher and student share `width` columns of states and weights; everything else is noise of --near."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    generator = torch.Generator(device).manual_seed(arguments.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens, vocab = arguments.tokens, arguments.vocab
    width = min(arguments.hidden, arguments.teacher_hidden)
    states, weight = normal(tokens, width), normal(vocab, width) * (LOGIT_SPREAD / width**0.5)

    def widened(total: int, noise: float) -> tuple[Tensor, Tensor]:
        """States [N, total] and weight [V, total]; the noise of the logits has standard deviation `noise`."""
        more = total - width
        wide = F.pad(weight, (0, more)) + normal(vocab, total) * (noise / total**0.5)
        return torch.cat([states, normal(tokens, more)], dim=1).to(dtype), wide.to(dtype)

    # The wider of the two carries the noise that is between them.
    noise = (arguments.near, 0.0) if arguments.teacher_hidden > width else (0.0, arguments.near)
    teacher_hidden, teacher_weight = widened(arguments.teacher_hidden, noise[0])
    hidden, weight = widened(arguments.hidden, noise[1])
    ids, logprobs, labels = [], [], []
    wide = teacher_weight.double()
    for part in teacher_hidden.split(max(1, CHUNK // vocab)):
        logits = part.double() @ wide.t()
        top = logits.topk(arguments.top_k, dim=1)
        ids.append(top.indices.int())
        logprobs.append((top.values - logits.logsumexp(1, keepdim=True)).float())
        labels.append(torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1))
    target = SparseTarget(torch.cat(ids), torch.cat(logprobs))
    return Inputs(
        hidden, weight, torch.cat(labels), teacher_hidden, teacher_weight, target, arguments.alpha
    )


@dataclass
class Oracle:
    """Gradients of the losses in fp64 by autograd on whole rows: d hidden [n, H] of `tokens` [n], d weight [m, H] of `rows` [m]."""

    inputs: Inputs
    tokens: Tensor
    rows: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, names: set[str]) -> Oracle:
        """The gradients of the losses `names`, on random tokens and on rows of which half are kept by the teacher most often."""
        count, vocab = inputs.tokens, inputs.weight.shape[0]
        device = inputs.hidden.device
        tokens = torch.randperm(count, device=device)[:CHECKED_TOKENS].sort().values
        often = torch.bincount(inputs.target.indices.flatten().long(), minlength=vocab)
        often = (often + torch.rand(vocab, device=device)).argsort(descending=True)[
            : CHECKED_ROWS // 2
        ]
        rows = torch.cat(
            [often, torch.randperm(vocab, device=device)[: CHECKED_ROWS // 2]]
        ).unique()
        oracle = cls(inputs, tokens, rows)
        states, weight = inputs.hidden.double(), inputs.weight.double()
        for name in names:
            oracle.hidden[name] = states.new_empty(len(tokens), states.shape[1])
            oracle.weight[name] = states.new_zeros(len(rows), states.shape[1])
        teacher = inputs.teacher_weight.double() if names - {"CE", TOP_K_LOSS} else None
        for part in torch.arange(count, device=device).split(max(1, CHUNK // vocab)):
            oracle._add(part, states[part], weight, teacher)
        return oracle

    def _add(self, part: Tensor, states: Tensor, weight: Tensor, teacher: Tensor | None) -> None:
        given = self.inputs
        logits = (states @ weight.t()).requires_grad_()
        theirs = (
            logits.detach()
            if teacher is None
            else given.teacher_hidden[part].double() @ teacher.t()
        )
        target = given.target.map(lambda tensor: tensor[part])
        chosen = torch.isin(part, self.tokens)
        place, share = torch.searchsorted(self.tokens, part[chosen]), len(part) / given.tokens
        for name in self.hidden:
            (gradient,) = torch.autograd.grad(
                token_loss(name, logits, theirs, given.labels[part], target, given.alpha).mean(),
                logits,
            )
            self.hidden[name][place] = gradient[chosen] @ weight * share
            self.weight[name] += gradient[:, self.rows].t() @ states * share

    def errors(self, variant: Variant, found: Any) -> dict[str, float]:
        """Relative Frobenius errors of what the variant gave: gradients (hidden, weight), or targets."""
        if variant.computes == "product":
            return {}
        if variant.computes == "targets":
            return {"logprobs": _relative(found.logprobs, self.inputs.target.logprobs)}
        hidden, weight = found
        return {
            "hidden": _relative(hidden[self.tokens], self.hidden[variant.computes]),
            "weight": _relative(weight[self.rows], self.weight[variant.computes]),
        }


def _relative(found: Tensor, expected: Tensor) -> float:
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return math.inf if math.isnan(error) else error


@dataclass
class Runner:
    """One variant, ready to run. row: what is reported of it."""

    variant: Variant
    call: Call
    inputs: Inputs
    row: dict[str, Any]
    main_grad: Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self) -> Any:
        """Forward and backward: (d hidden [N, H], d weight [V, H]); what has no gradient just runs."""
        if self.variant.computes in NO_GRADIENT:
            return self.call(self.inputs, self.inputs.hidden, self.inputs.weight)
        hidden, weight = (
            t.detach().requires_grad_() for t in (self.inputs.hidden, self.inputs.weight)
        )
        if self.main_grad is None:
            return torch.autograd.grad(self.call(self.inputs, hidden, weight), (hidden, weight))
        weight.main_grad = self.main_grad
        d_hidden, _ = torch.autograd.grad(self.call(self.inputs, hidden, weight), (hidden, weight))
        return d_hidden, self.main_grad

    def check(self, oracle: Oracle, limit: float) -> None:
        """The first run: its gradients and its memory."""
        if self.variant.main_grad:
            self.main_grad = torch.zeros_like(self.inputs.weight, dtype=torch.float32)
        found, self.row["peak_bytes"] = _peak(self.run, self.inputs.hidden.device)
        self.row["error"], self.row["limit"] = oracle.errors(self.variant, found), limit
        worst = max(self.row["error"].values(), default=0.0)
        if not worst <= limit:
            self.row |= {
                "status": "wrong gradient",
                "reason": f"wrong gradient: error {worst:.1e}, limit {limit:.1e}",
            }

    def time(self) -> None:
        """One measured run. On a GPU one comes before it, for the allocator's cache is empty."""
        device = self.inputs.hidden.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self.run()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begin)

    def guard(self, step: Callable[[], None]) -> None:
        """Runs `step`; the row says so where it fails."""
        try:
            step()
        except torch.OutOfMemoryError:
            self.row |= {"status": "out of memory", "reason": "out of memory"}
        except (
            Exception
        ) as error:  # another library may fail in any way; the others are still measured
            first, *_ = [*str(error).splitlines(), ""]
            self.row |= {"status": "failed", "reason": f"failed: {type(error).__name__}: {first}"}


def _peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `call` returns, and the most bytes it had allocated at one time beyond what lived before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = call()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return found, peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, check and time the variants; the whole report."""
    device = torch.device(arguments.device)
    rows, runners = [], []
    started = dist.is_initialized()
    torch.manual_seed(arguments.seed)
    inputs = make_inputs(arguments)
    for variant in VARIANTS:
        if arguments.only and variant.name not in arguments.only:
            continue
        row: dict[str, Any] = {
            key: getattr(variant, key) for key in ("name", "computes", "teacher", "own")
        }
        row |= {
            "status": "measured",
            "reason": "",
            "seconds": None,
            "ratio": {},
            "peak_bytes": None,
            "error": {},
            "limit": None,
        }
        rows.append(row)
        try:
            runners.append(Runner(variant, variant.prepare(device), inputs, row))
        except Unavailable as reason:
            row |= {"status": "unavailable", "reason": str(reason)}
    _say("gradients in fp64")
    oracle = Oracle.of(inputs, {runner.variant.computes for runner in runners} - set(NO_GRADIENT))
    for runner in runners:
        _say(f"checking {runner.variant.name}")
        runner.guard(
            lambda runner=runner: runner.check(
                oracle, runner.variant.limit(arguments.dtype, arguments.near)
            )
        )
    for index in range(arguments.rounds):
        _say(f"round {index + 1} of {arguments.rounds}")
        for runner in runners:
            if runner.row["status"] == "measured":
                runner.guard(runner.time)
    if dist.is_initialized() and not started:
        dist.destroy_process_group()
    _say("")
    _summarize(runners)
    return _report(arguments, rows)


def _summarize(runners: list[Runner]) -> None:
    """Spreads, and ratios to the two plain cross-entropies and to the teacher's product, round by round."""
    measured = {
        runner.variant.name: runner for runner in runners if runner.row["status"] == "measured"
    }
    for runner in measured.values():
        runner.row["seconds"] = _spread(runner.seconds)
        for name in (peers.BASELINE, peers.PLAIN, peers.PRODUCT):
            if name in measured:
                pairs = zip(runner.seconds, measured[name].seconds, strict=True)
                runner.row["ratio"][name] = _spread([mine / other for mine, other in pairs])


def _report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    cuda = arguments.device == "cuda"
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **versions(),
            "cuda": torch.version.cuda if cuda else None,
        },
        "options": vars(arguments),
        "variants": rows,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


LEGEND = """KL is KL(teacher || student); top-k are the teacher's kept entries, rescaled to sum to 1. Ratios: / Megatron to megatron-core's
fused cross-entropy and / torch to torch's, both on full logits and without distillation; the rows "product" and "targets" have no
student, and their second ratio is to the bare product. Errors are relative, to the gradients of the named loss in fp64."""


def _table(result: dict[str, Any]) -> str:
    options = result["options"]
    parts = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version
    )
    sizes = ", ".join(
        f"{name} {options[name]}"
        for name in ("tokens", "hidden", "vocab", "top_k", "alpha", "near", "dtype", "rounds")
    )
    lines = [
        f"{result['device']}, {result['threads']} threads; {parts}; commit {result['commit']}",
        sizes,
        "",
    ]
    names = f"{'ms (min .. max)':>28}{'/ Megatron':>11}{'/ torch':>9}{'MiB':>9}{'d hidden':>10}{'d weight':>10}"
    head = f"{'variant':21}{'loss':21}{'teacher':8}{names}"
    lines += [head, "-" * len(head)]
    for row in result["variants"]:
        start = f"{row['name']:21}{row['computes']:21}{row['teacher']:8}"
        if row["seconds"] is None:
            lines.append(f"{start}{row['reason']}")
            continue
        low, middle, high = (row["seconds"][key] * 1e3 for key in ("min", "median", "max"))
        second = peers.PRODUCT if row["computes"] in NO_GRADIENT else peers.PLAIN
        ratios = [
            f"{row['ratio'][name]['median']:.2f}" if name in row["ratio"] else "-"
            for name in (peers.BASELINE, second)
        ]
        errors = [
            f"{row['error'][key]:.1e}" if key in row["error"] else "-"
            for key in ("hidden", "weight")
        ]
        if "logprobs" in row["error"]:
            errors = [f"{row['error']['logprobs']:.1e}", "(targets)"]
        times = f"{middle:.1f} ({low:.1f} .. {high:.1f})"
        numbers = f"{ratios[0]:>11}{ratios[1]:>9}{row['peak_bytes'] / 2**20:9.1f}{errors[0]:>10}{errors[1]:>10}"
        lines.append(f"{start}{times:>28}{numbers}")
    return "\n".join([*lines, "", LEGEND])


if __name__ == "__main__":
    sys.exit(main())
