"""Fit the scaling laws of plain and distilled pretraining to runs, and predict with them (arXiv 2502.08606).

    python tools/scaling_law.py --points runs.csv --parameters 1e9 --tokens 100e9 --teacher-loss 2.1 --picture law.png
    python tools/scaling_law.py --run sweep/run-* --split heldout --evaluation teacher.json --json law.json
    python tools/scaling_law.py --published --preset llama-3.2-1b --teacher-preset llama-3.1-8b --tokens 100e9 --teacher-loss 2.1

Points are a .csv or .json table (parameters without embeddings, tokens, loss, teacher_loss or empty) or finished run directories.
12 runs without a teacher are needed for the one law and 18 with one for the other, two for each coefficient that is not held
(--hold supervised.gamma=0.452). Single coefficients are poorly determined even by hundreds of runs, and their intervals say so; predicted
losses are what to use. Measured on 24 sets of points made with the published coefficients (24 or 73 runs without, 40 or 150 with a
teacher, noise of 0.1, 0.5 or 2 %): 95 % intervals held the truth of 348 of 360 coefficients and 138 of 144 predicted losses
(tests/sweep/test_scaling_law.py, test_coverage).

With --teacher-parameters or --teacher-preset, distillation is compared with plain training at equal FLOPs, the teacher's forward passes
counted by --teacher-forward (1: online; 1/k: a cache for k students; 0: a cache that exists) and its own training by --teacher-training
(0: it exists; 1: trained for this student alone), on --teacher-tokens. With presets FLOPs include attention and head, else they are 2
per parameter and token and forward pass.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.storage.exit_codes import BAD_INPUT
from megatron_kd.sweep.scaling.compute import Prices, compare, forward_flops
from megatron_kd.sweep.scaling.law import (
    PUBLISHED_DISTILLATION,
    PUBLISHED_SUPERVISED,
    DistillationLaw,
    Estimate,
    Fit,
    SupervisedLaw,
    fit_distillation,
    fit_supervised,
)
from megatron_kd.sweep.scaling.points import read_run, read_table

Supervised = Fit[SupervisedLaw] | SupervisedLaw
Distilled = Fit[DistillationLaw] | DistillationLaw | None


def main(argv: list[str] | None = None) -> int:
    """Parse, fit, predict, report."""
    arguments = _parser().parse_args(argv)
    try:
        supervised, distilled = _laws(arguments)
        query = _query(arguments)
        found = {
            "laws": _coefficients(supervised, distilled),
            "predictions": _predictions(supervised, distilled, query, arguments),
        }
        if arguments.picture is not None:
            from megatron_kd.sweep.scaling.picture import draw

            draw(supervised, distilled, arguments.picture, query)
        if arguments.json is not None:
            from megatron_kd.storage.atomic_files import write_atomically

            write_atomically(
                arguments.json, (json.dumps({"query": query, **found}, indent=2) + "\n").encode()
            )
    except (ConfigError, OSError) as error:
        print(f"scaling_law: error: {error}", file=sys.stderr)
        return BAD_INPUT
    _print(found, query, arguments.level)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--points",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="tables of runs, .csv or .json",
    )
    add(
        "--run",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="DIRECTORY",
        help="finished run directories",
    )
    add("--split", help="their validation set (the only one)")
    add(
        "--evaluation",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="tools/evaluate.py's JSON of teachers",
    )
    add("--published", action="store_true", help="take the paper's coefficients and fit nothing")
    add(
        "--published-supervised",
        action="store_true",
        help="take the paper's law of plain runs, and fit that of distilled ones",
    )
    add(
        "--hold",
        action="append",
        default=[],
        metavar="LAW.NAME=VALUE",
        help="do not fit this coefficient: supervised.* or distillation.*",
    )
    add(
        "--resamples",
        type=int,
        default=200,
        help="fits to resampled points, for the intervals (200)",
    )
    add("--level", type=float, default=0.95, help="of the intervals (0.95)")
    add("--seed", type=int, default=0, help="of the resampling (0)")
    add(
        "--parameters",
        type=float,
        help="predict for a student of so many parameters, without embeddings",
    )
    add("--preset", help="in place of --parameters: a known model")
    add("--tokens", type=float, help="tokens it is trained on")
    add(
        "--teacher-loss",
        type=float,
        help="its teacher's cross-entropy on the same validation data, nats per token",
    )
    add(
        "--teacher-parameters", type=float, help="the teacher's, without embeddings: for FLOPs only"
    )
    add("--teacher-preset", help="in place of --teacher-parameters")
    add(
        "--teacher-forward",
        type=float,
        default=1.0,
        help="share of the teacher's forward passes that is paid here (1: online)",
    )
    add(
        "--teacher-training",
        type=float,
        default=0.0,
        help="share of the teacher's own training that is paid here (0)",
    )
    add("--teacher-tokens", type=float, default=0.0, help="tokens the teacher was trained on")
    add(
        "--sequence-length",
        type=int,
        default=4096,
        help="with presets: tokens per sequence, for FLOPs (4096)",
    )
    add("--json", type=Path, help="write all numbers to this file")
    add("--picture", type=Path, help="draw residuals and curves with their intervals")
    return parser


def _laws(arguments: argparse.Namespace) -> tuple[Supervised, Distilled]:
    if arguments.published:
        if arguments.points or arguments.run:
            raise ConfigError(
                "--published takes no points: leave out --points and --run, or --published"
            )
        return PUBLISHED_SUPERVISED, PUBLISHED_DISTILLATION
    if not (arguments.points or arguments.run):
        raise ConfigError(
            "points are needed: --points FILE or --run DIRECTORY, or --published for the paper's coefficients"
        )
    points = [point for path in arguments.points for point in read_table(path)]
    points += [
        read_run(path, split=arguments.split, evaluations=arguments.evaluation)
        for path in arguments.run
    ]
    options = {"resamples": arguments.resamples, "level": arguments.level, "seed": arguments.seed}
    held = _held(arguments.hold)
    supervised: Supervised = PUBLISHED_SUPERVISED
    if not arguments.published_supervised:
        supervised = fit_supervised(points, held=held["supervised"], **options)
    if all(point.teacher_loss is None for point in points):
        return supervised, None
    return supervised, fit_distillation(points, supervised, held=held["distillation"], **options)


def _held(texts: list[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"supervised": {}, "distillation": {}}
    for text in texts:
        key, _, value = text.partition("=")
        law, _, name = key.partition(".")
        try:
            found[law][name] = float(value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"--hold {text} must be LAW.NAME=VALUE, such as supervised.gamma=0.452 or distillation.f1=0.09"
            ) from None
    return found


def _query(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is asked for: parameters, tokens, teacher_loss, and the prices where a teacher's size is given."""
    found: dict[str, Any] = {"tokens": arguments.tokens, "teacher_loss": arguments.teacher_loss}
    found["parameters"], student = _size(
        arguments.parameters, arguments.preset, "", arguments.sequence_length
    )
    _, teacher = _size(
        arguments.teacher_parameters,
        arguments.teacher_preset,
        "teacher-",
        arguments.sequence_length,
    )
    for name in ("parameters", "tokens", "teacher_loss"):
        if found[name] is not None and not 0 < found[name] < float("inf"):
            raise ConfigError(
                f"--{name.replace('_', '-')} ({found[name]}) must be positive and finite"
            )
    if (found["parameters"] is None) != (found["tokens"] is None):
        raise ConfigError("a prediction needs both --parameters (or --preset) and --tokens")
    if student is not None and teacher is not None:
        shares = {"logits": arguments.teacher_forward, "pretraining": arguments.teacher_training}
        found["prices"] = asdict(
            Prices(student, teacher, **shares, teacher_tokens=arguments.teacher_tokens)
        )
    return found


def _size(
    parameters: float | None, preset: str | None, prefix: str, length: int
) -> tuple[float | None, float | None]:
    """Parameters without embeddings, and FLOPs of a forward pass over one token."""
    if preset is None:
        return parameters, None if parameters is None else forward_flops(parameters)
    if parameters is not None:
        raise ConfigError(
            f"--{prefix}parameters and --{prefix}preset say the same thing: give one of them"
        )
    from megatron_kd.config.presets import preset_values
    from megatron_kd.planning.flops import flops_per_token
    from megatron_kd.planning.parameters import parameter_count

    try:
        vocab_size = preset_values(preset)["vocab_size"]
    except ValueError as error:
        raise ConfigError(f"--{prefix}preset: {error}") from None
    model = ModelSection.model_validate({"preset": preset})
    return float(parameter_count(model, 0)), flops_per_token(
        model, vocab_size, length, forward_only=True
    )


def _coefficients(supervised: Supervised, distilled: Distilled) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, fit in (("supervised", supervised), ("distillation", distilled)):
        if isinstance(fit, Fit):
            found[name] = {
                "points": len(fit.points),
                "residual_percent": float(100 * abs(fit.residuals).mean()),
                "held": dict(fit.held),
                "undetermined": fit.undetermined(),
                "coefficients": {key: asdict(value) for key, value in fit.coefficients().items()},
            }
        elif fit is not None:
            values = {key: value for key, value in asdict(fit).items() if key != "supervised"}
            found[name] = {
                "points": 0,
                "coefficients": {key: asdict(Estimate(v, v, v)) for key, v in values.items()},
            }
    return found


def _predictions(
    supervised: Supervised,
    distilled: Distilled,
    query: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    n, d, t = query["parameters"], query["tokens"], query["teacher_loss"]
    if n is None:
        return {}
    asked: dict[str, tuple[Any, Any]] = {
        "alone, equal tokens": (supervised, lambda law: law.loss(n, d))
    }
    if distilled is not None:
        best = "the teacher's loss that is best for it"
        asked[best] = (distilled, lambda law: law.best_teacher_loss(n, d))
        asked["distilled by that teacher"] = (
            distilled,
            lambda law: law.loss(n, d, law.best_teacher_loss(n, d)),
        )
        if t is not None:
            asked["distilled"] = (distilled, lambda law: law.loss(n, d, t))
            asked["distilled - alone, equal tokens"] = (
                distilled,
                lambda law: law.loss(n, d, t) - law.supervised.loss(n, d),
            )
        if t is not None and "prices" in query:
            prices = Prices(**query["prices"])
            query["flops"], query["equal_flops_tokens"] = (
                prices.distilled(d),
                prices.supervised_tokens(d),
            )
            asked["alone, equal FLOPs"] = (
                distilled,
                lambda law: compare(law, n, d, t, prices).equal_flops,
            )
            asked["distilled - alone, equal FLOPs"] = (
                distilled,
                lambda law: (
                    compare(law, n, d, t, prices).distilled
                    - compare(law, n, d, t, prices).equal_flops
                ),
            )
    return {name: asdict(_estimate(fit, function)) for name, (fit, function) in asked.items()}


def _estimate(fit: Any, function: Any) -> Estimate:
    if isinstance(fit, Fit):
        return fit.estimate(function)
    value = float(function(fit))
    return Estimate(value, value, value)


def _print(found: dict[str, Any], query: dict[str, Any], level: float) -> None:
    for law, of in found["laws"].items():
        if not of["points"]:
            print(f"{law}: the published coefficients")
        else:
            print(
                f"{law}: {of['points']} runs, missed by {of['residual_percent']:.2f} % on average; intervals of {100 * level:g} %"
            )
        for name, value in of["coefficients"].items():
            print(
                f"  {name:8}{_interval(value)}{'   not determined' if name in of.get('undetermined', []) else ''}"
            )
    if found["predictions"]:
        teacher = (
            f", teacher at {query['teacher_loss']:g}" if query["teacher_loss"] is not None else ""
        )
        print(
            f"{query['parameters']:.4g} parameters, {query['tokens']:.4g} tokens{teacher}; nats per token"
        )
        for name, value in found["predictions"].items():
            print(f"  {name:40}{_interval(value, '.4f')}")
    if "flops" in query:
        print(
            f"  {query['flops']:.3e} FLOPs distilled, for which it trains alone on {query['equal_flops_tokens']:.4g} tokens"
        )


def _interval(of: dict[str, float], form: str = ".4g") -> str:
    text = f"{of['value']:>12{form}}"
    return (
        text if of["low"] == of["high"] else f"{text}   {of['low']:{form}} .. {of['high']:{form}}"
    )


if __name__ == "__main__":
    sys.exit(main())
