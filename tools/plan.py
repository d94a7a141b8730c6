r"""Plan a run before paying for it: which layouts fit, how fast, and whether to cache the teacher.

    python tools/plan.py --preset llama-3.2-1b --teacher-preset llama-3.1-8b \
        --gpus 64 --gpu h100 --tokens 100e9 --picture plan.png
    # the run file's own layout
    python tools/plan.py --config run.toml --cluster cluster.toml --parallel.tensor 2 --as-given
    # measured on this machine, for --calibration
    python tools/plan.py calibrate --ranks 8 --output here.json

Every layout of student and teacher over the GPUs that the program would accept gets an estimate of
peak memory by part (planning/memory.py) and of the seconds of a step by part
(planning/step_time.py). Keys of the run file are overridden as --section.key value. A file given as
--cluster holds options of this tool by name, such as gpus = 64. Nothing is started and no GPU is
needed, except by calibrate, which runs tools/bench_step.py (its options can follow) and
tools/measure_links.py under torchrun for a few minutes.

Without --calibration the rates are assumed: --mfu is the share of the peak that a rank reaches
while it computes and waits for no other rank. The value of the whole step is lower.

Exit codes: 0 done, 2 bad input, or nothing fits.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.planning.hardware import (
    FRAMEWORK_BYTES,
    GIB,
    GPUS,
    LATENCY,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    ClusterOptions,
    resolve_cluster,
)
from megatron_kd.planning.machine_rates import (
    bench_run,
    calibrate,
    calibration_content,
    read_calibration,
)
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.reports.budget import Prices
from megatron_kd.planning.reports.config_words import (
    load_run_file,
    load_with_defaults,
    overridden_keys,
)
from megatron_kd.planning.reports.plan import Machine, TrainingOptions, make_plan
from megatron_kd.planning.reports.plan_text import PlanReport, as_numbers, as_text
from megatron_kd.planning.step_time import ComputeRates
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.storage.exit_codes import BAD_INPUT
from megatron_kd.teacher.source import teacher_source

TOOLS = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Parse, plan, print."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["calibrate"]:
            print(_calibrate(words[1:]))
            return 0
        arguments, overrides = _arguments(words)
        report = _plan(arguments, overrides)
        if arguments.picture is not None:
            from megatron_kd.planning.reports.plan_picture import draw_plan

            draw_plan(report, Path(arguments.picture), arguments.show)
    except ConfigError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(
        json.dumps(as_numbers(report, arguments.show), indent=2)
        if arguments.json
        else as_text(report, arguments.show)
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_run_options(parser)
    _add_cluster_options(parser)
    _add_budget_options(parser)
    add = parser.add_argument
    add("--show", type=int, default=8, help="layouts to show (%(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--picture", help="also draw the layouts into this file (.png, .svg, .pdf)")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", help="run file; its teacher.checkpoint is read")
    add("--preset", help="shape of the student, in place of a run file")
    add("--teacher-preset", help="shape of the teacher, in place of teacher.checkpoint")
    add("--as-given", action="store_true", help="the run file's own layout and nothing else")


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", help="TOML file with options of this tool")
    add("--gpus", type=int, help="all of them (required)")
    add("--gpu", help=f"one of {', '.join(GPUS)}; single numbers below win over it")
    add("--gpu-memory-gib", type=float, help="memory of one GPU")
    add("--peak-tflops", type=float, help="dense bf16 peak of one GPU")
    bandwidth = f"GB/s of its memory by data sheet; {MEMORY_EFFICIENCY:g} of it is used"
    add("--memory-bandwidth-gbs", type=float, help=bandwidth)
    add("--intra-bandwidth-gbs", type=float, help="GB/s of one GPU within a node, one direction")
    add("--inter-bandwidth-gbs", type=float, help="GB/s of network a GPU, one direction")
    add("--gpus-per-node", type=int)
    efficiency = "share of those two that collectives reach (%(default)s)"
    add("--link-efficiency", type=float, default=LINK_EFFICIENCY, help=efficiency)
    latency = "microseconds of the smallest collective (%(default)g)"
    add("--latency-us", type=float, default=LATENCY * 1e6, help=latency)
    framework = "CUDA context, NCCL, workspaces, fragments (%(default)g)"
    add("--framework-gib", type=float, default=FRAMEWORK_BYTES / GIB, help=framework)
    mfu = "student's share of the peak while it computes (%(default)s)"
    add("--mfu", type=float, default=0.45, help=mfu)
    add("--teacher-mfu", type=float, help="the teacher's (as --mfu)")
    calibration = "file of plan.py calibrate: measured rates and links in place of assumed ones"
    add("--calibration", help=calibration)


def _add_budget_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=float, help="of the whole training, such as 100e9")
    students = "that learn from the same teacher and tokens (%(default)s)"
    add("--students", type=int, default=1, help=students)
    add("--price-per-gpu-hour", type=float)
    add("--price-per-tib-month", type=float, help="of storage")
    add("--currency", default="", help="printed behind prices")
    record = "as inspect_cache.py stats says; else from --cache-entries"
    add("--cache-bytes-per-token", type=float, help=record)
    entries = "entries kept of a token on average; else all that [distill] keeps"
    add("--cache-entries", type=float, help=entries)


def _arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(words)
    if arguments.cluster is not None:
        parser.set_defaults(**_cluster_file(Path(arguments.cluster), vars(arguments)))
        arguments, overrides = parser.parse_known_args(words)
    _check(arguments)
    return arguments, overrides


def _cluster_file(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a TOML file.

    Raises:
        ConfigError: if the file cannot be read, or an option is not known.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--cluster {path} cannot be read: {error}") from None
    for name, value in values.items():
        if name not in known or name == "cluster":
            raise ConfigError(
                f"--cluster {path}: {name} is no option of this tool (--help lists them, with _ "
                "for -)"
            )
        kind = next(action.type for action in _parser()._actions if action.dest == name)
        if kind in (int, float) and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ConfigError(f"--cluster {path}: {name} must be a number, got {value!r}")
    return values


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for numbers out of range."""
    if arguments.gpus is None or arguments.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {arguments.gpus}")
    for name in ("mfu", "teacher_mfu", "link_efficiency"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be in (0, 1], got {value:g}")
    numbers = (
        "gpu_memory_gib",
        "peak_tflops",
        "memory_bandwidth_gbs",
        "intra_bandwidth_gbs",
        "inter_bandwidth_gbs",
        "gpus_per_node",
    )
    for name in (*numbers, "tokens", "students", "show", "cache_bytes_per_token", "cache_entries"):
        value = getattr(arguments, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    for name in ("latency_us", "framework_gib", "price_per_gpu_hour", "price_per_tib_month"):
        value = getattr(arguments, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')} must not be below 0, got {value:g}")


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> PlanReport:
    machine = _machine(arguments)
    config = _config(arguments, overrides)
    teacher = _teacher(arguments, config)
    vocab_size = config.model.vocab_size or _tokenizer_size(config)
    run = PlannedRun(config, vocab_size, teacher, machine.cluster.device)
    training = TrainingOptions(
        tokens=arguments.tokens,
        students=arguments.students,
        bytes_per_token=arguments.cache_bytes_per_token,
        entries=arguments.cache_entries,
        prices=Prices(arguments.price_per_gpu_hour, arguments.price_per_tib_month),
        currency=arguments.currency,
    )
    title = _title(arguments, config, machine)
    return make_plan(title, run, machine, training, keep_layout=arguments.as_given)


def _title(arguments: argparse.Namespace, config: RunConfig, machine: Machine) -> str:
    student = arguments.preset or arguments.config or "student"
    teacher = ""
    if config.teacher.enabled:
        name = arguments.teacher_preset or config.teacher.checkpoint
        teacher = f" from {name or 'a cache'}"
    return f"{student}{teacher} on {machine.cluster.ranks} x {machine.cluster.name}"


def _machine(arguments: argparse.Namespace) -> Machine:
    """Return a data sheet's machine, with numbers by hand, or with a calibration's."""
    calibration = None
    if arguments.calibration is not None:
        calibration = calibrate(read_calibration(Path(arguments.calibration)))
    factors = {
        "memory": (arguments.gpu_memory_gib, GIB),
        "peak": (arguments.peak_tflops, 1e12),
        "memory_bandwidth": (arguments.memory_bandwidth_gbs, 1e9 * MEMORY_EFFICIENCY),
        "intra": (arguments.intra_bandwidth_gbs, 1e9 * arguments.link_efficiency),
        "inter": (arguments.inter_bandwidth_gbs, 1e9 * arguments.link_efficiency),
        "gpus_per_node": (arguments.gpus_per_node, 1),
    }
    options = ClusterOptions(
        ranks=arguments.gpus,
        gpu=arguments.gpu,
        numbers={name: value * factor for name, (value, factor) in factors.items() if value},
        link_efficiency=arguments.link_efficiency,
        latency=arguments.latency_us * 1e-6,
        framework=arguments.framework_gib * GIB,
    )
    cluster = resolve_cluster(options, None if calibration is None else calibration.cluster)
    if calibration is not None:
        return Machine(cluster, calibration.rates, calibration)
    teacher_mfu = arguments.teacher_mfu or arguments.mfu
    rates = ComputeRates(arguments.mfu * cluster.peak, teacher_mfu * cluster.peak)
    return Machine(cluster, rates)


def _config(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    preset, teacher = arguments.preset, arguments.teacher_preset
    teacher_keys: dict[str, str] = {}
    if teacher is not None:
        teacher_keys = {"--teacher.source": "online", "--teacher.checkpoint": teacher}
    if arguments.config is not None:
        config = load_run_file(arguments.config, preset, overrides)
        if not teacher_keys or config.teacher.enabled:
            return config
        words = [word for pair in teacher_keys.items() for word in pair]
        return load_run_file(arguments.config, preset, [*overrides, *words])
    defaults = {"--batch.global_batch_size": "512"}
    keys = overridden_keys(overrides)
    if "--distill.num_draws" not in keys and "--distill.dense" not in keys:
        defaults["--distill.tail"] = "bucket"
    if preset is not None:
        defaults["--model.preset"] = preset
    return load_with_defaults(overrides, defaults | teacher_keys)


def _teacher(arguments: argparse.Namespace, config: RunConfig) -> ModelSection | None:
    """Return the shape of the teacher, or None.

    Raises:
        ConfigError: if the preset or the checkpoint cannot be read.
    """
    if arguments.teacher_preset is not None:
        try:
            return ModelSection.model_validate({"preset": arguments.teacher_preset})
        except ValueError as error:
            message = error.errors()[0]["msg"] if hasattr(error, "errors") else error
            raise ConfigError(f"--teacher-preset: {message}") from None
    return teacher_source(config).read_model()


def _tokenizer_size(config: RunConfig) -> int:
    from megatron_kd.data.tokenizer import load_tokenizer

    assert config.data.tokenizer is not None
    return load_tokenizer(config.data.tokenizer)[1].vocab_size


def _calibrate(words: list[str]) -> str:
    """Measure this machine and write the calibration file.

    The online step is measured but not used, so that its prediction checks the result.
    """
    parser = argparse.ArgumentParser(prog="plan.py calibrate", description=_calibrate.__doc__)
    parser.add_argument(
        "--ranks", type=int, required=True, help="processes, one a GPU (or CPU rank)"
    )
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments, options = parser.parse_known_args(words)
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {arguments.ranks}")
    device = ["--device", arguments.device]
    links = json.loads(_torchrun(arguments.ranks, ["measure_links.py", *device, "--json"]))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "step.json"
        output = ["--output", str(result)]
        _torchrun(arguments.ranks, ["bench_step.py", *device, *options, *output])
        if not result.is_file():
            raise ConfigError(f"bench_step.py failed on {arguments.ranks} ranks: no result")
        steps = json.loads(result.read_text(encoding="utf-8"))
    content = calibration_content(links, steps, arguments.ranks)
    calibration = calibrate(content)
    write_atomically(arguments.output, (json.dumps(content, indent=2) + "\n").encode())
    rates = calibration.rates
    lines = [
        f"student {rates.student / 1e9:,.1f} GFLOP/s a rank, teacher {rates.teacher / 1e9:,.1f}, "
        "while they compute"
    ]
    for measured in content["runs"]:
        if measured["kind"] == "online":
            run = bench_run(content["settings"], measured, calibration.cluster.device)
            lines.append(
                f"the online step, not used: predicted {calibration.predict(run).seconds:.3f} s, "
                f"measured {measured['seconds']['median']:.3f} s"
            )
    return "\n".join([*lines, f"written: {arguments.output}"])


def _torchrun(ranks: int, words: list[str]) -> str:
    """Run a tool of this folder on `ranks` processes and return its last line of output.

    Raises:
        ConfigError: if it fails.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(ranks), str(TOOLS / words[0]), *words[1:]]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        message = (errors or lines or ["no message"])[0]
        raise ConfigError(f"{words[0]} failed on {ranks} ranks: {message}")
    return (process.stdout.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
