"""Plan a run before paying for it: which layouts fit, how fast they are, and whether to store the teacher.

    python tools/plan.py --preset llama-3.2-1b --teacher-preset llama-3.1-8b --gpus 64 --gpu h100 --tokens 100e9 --picture plan.png
    python tools/plan.py --config run.toml --cluster cluster.toml --parallel.tensor 2 --as-given     # the run file's own layout
    python tools/plan.py calibrate --ranks 8 --output here.json                                      # measured here, for --calibration

Every layout of student and teacher over the GPUs that the program would accept is priced: bytes of the fullest rank by part
(planning/memory.py), seconds of a step by part (planning/step_time.py). Keys of the run file are overridden as --section.key value. A file
given as --cluster holds options of this tool by name, gpus = 64. Nothing is started and no GPU is needed, except by calibrate, which runs
tools/bench_step.py (its options can follow) and tools/measure_links.py under torchrun, a few minutes.

Without --calibration the rates are assumed: --mfu is the share of the peak that a rank reaches while it computes and waits for nobody;
what comes out for the whole step is lower. Exit codes: 0 done, 2 bad input, or nothing fits.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, ModelSection, RunConfig, load_config
from megatron_kd.planning.budget import Budget, Prices, Steps, assumed_bytes_per_token, budget
from megatron_kd.planning.hardware import (
    FRAMEWORK,
    GIB,
    GPUS,
    LATENCY,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    Cluster,
    cluster_of,
    known_gpu,
)
from megatron_kd.planning.machine_rates import (
    KIND,
    Calibration,
    bench_job,
    bench_runs,
    calibrate,
    read_calibration,
)
from megatron_kd.planning.memory import Job
from megatron_kd.planning.report import Report, as_numbers, as_text
from megatron_kd.planning.search import Found, Plan, evaluate, search
from megatron_kd.planning.step_time import Rates
from megatron_kd.storage.atomic_files import write_atomically

TOOLS = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Parse, plan, print."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["calibrate"]:
            print(_calibrate(words[1:]))
            return 0
        arguments, overrides = _arguments(words)
        report = plan(arguments, overrides)
        if arguments.picture is not None:
            from megatron_kd.planning.picture import draw

            draw(report, Path(arguments.picture), arguments.show)
    except ConfigError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
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
    add = parser.add_argument
    add("--config", help="run file; its teacher.checkpoint is read")
    add("--preset", help="shape of the student, in place of a run file")
    add("--teacher-preset", help="shape of the teacher, in place of teacher.checkpoint")
    add("--as-given", action="store_true", help="the run file's own layout and nothing else")
    add("--cluster", help="TOML file with options of this tool")
    add("--gpus", type=int, help="all of them (required)")
    add("--gpu", help=f"one of {', '.join(GPUS)}; single numbers below win over it")
    add("--gpu-memory-gib", type=float, help="memory of one GPU")
    add("--peak-tflops", type=float, help="dense bf16 peak of one GPU")
    add(
        "--memory-bandwidth-gbs",
        type=float,
        help=f"GB/s of its memory by data sheet; {MEMORY_EFFICIENCY:g} of it is used",
    )
    add("--intra-bandwidth-gbs", type=float, help="GB/s of one GPU within a node, one direction")
    add("--inter-bandwidth-gbs", type=float, help="GB/s of network a GPU, one direction")
    add("--gpus-per-node", type=int)
    add(
        "--link-efficiency",
        type=float,
        default=LINK_EFFICIENCY,
        help="share of those two that collectives reach (%(default)s)",
    )
    add(
        "--latency-us",
        type=float,
        default=LATENCY * 1e6,
        help="microseconds of the smallest collective (%(default)g)",
    )
    add(
        "--framework-gib",
        type=float,
        default=FRAMEWORK / GIB,
        help="CUDA context, NCCL, workspaces, fragments (%(default)g)",
    )
    add(
        "--mfu",
        type=float,
        default=0.45,
        help="student's share of the peak while it computes (%(default)s)",
    )
    add("--teacher-mfu", type=float, help="the teacher's (as --mfu)")
    add(
        "--calibration",
        help="file of plan.py calibrate: measured rates and links in place of assumed ones",
    )
    add("--tokens", type=float, help="of the whole training, such as 100e9")
    add(
        "--students",
        type=int,
        default=1,
        help="that learn from the same teacher and tokens (%(default)s)",
    )
    add("--price-per-gpu-hour", type=float)
    add("--price-per-tib-month", type=float, help="of storage")
    add("--currency", default="", help="printed behind prices")
    add(
        "--cache-bytes-per-token",
        type=float,
        help="as inspect_cache.py stats says; else from --cache-entries",
    )
    add(
        "--cache-entries",
        type=float,
        help="entries kept of a token on average; else all that [distill] keeps",
    )
    add("--show", type=int, default=8, help="layouts to show (%(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--picture", help="also draw the layouts into this file (.png, .svg, .pdf)")
    return parser


def _arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(words)
    if arguments.cluster is not None:
        parser.set_defaults(**_cluster_file(Path(arguments.cluster), vars(arguments)))
        arguments, overrides = parser.parse_known_args(words)
    _check(arguments)
    return arguments, overrides


def _cluster_file(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Options from a TOML file. ConfigError for one that is not known, or not a file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--cluster {path} cannot be read: {error}") from None
    for name, value in values.items():
        if name not in known or name == "cluster":
            raise ConfigError(
                f"--cluster {path}: {name} is no option of this tool (--help lists them, with _ for -)"
            )
        kind = next(action.type for action in _parser()._actions if action.dest == name)
        if kind in (int, float) and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ConfigError(f"--cluster {path}: {name} must be a number, got {value!r}")
    return values


def _check(arguments: argparse.Namespace) -> None:
    """ConfigError for numbers that mean nothing."""
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


def plan(arguments: argparse.Namespace, overrides: list[str]) -> Report:
    """Everything the arguments ask for. ConfigError, one sentence, for what cannot be planned."""
    calibration = (
        calibrate(read_calibration(Path(arguments.calibration)))
        if arguments.calibration is not None
        else None
    )
    cluster = _cluster(arguments, calibration)
    config = _config(arguments, overrides)
    teacher = _teacher(arguments, config)
    vocab_size = config.model.vocab_size or _tokenizer_size(config)
    job = Job(config, vocab_size, teacher, cluster.device)
    rates = Rates(
        arguments.mfu * cluster.peak, (arguments.teacher_mfu or arguments.mfu) * cluster.peak
    )
    if calibration is not None:
        rates = calibration.rates
    found = _found(job, cluster, rates, as_given=arguments.as_given)
    title = f"{arguments.preset or arguments.config or 'student'}{_teacher_name(arguments, config)} on {cluster.ranks} x {cluster.name}"
    compares = (
        arguments.tokens and teacher is not None and not config.distill.dense
    )  # whole distributions cannot be stored
    spent = _budget(arguments, job, cluster, rates, found.plans[0]) if compares else None
    return Report(
        title,
        found,
        cluster,
        spent,
        _notes(arguments, job, cluster, rates, calibration),
        arguments.currency,
    )


def _found(job: Job, cluster: Cluster, rates: Rates, *, as_given: bool) -> Found:
    if not as_given:
        return search(job, cluster, rates)
    given = evaluate(job, cluster, rates)
    return Found([given], 1, given)


def _cluster(arguments: argparse.Namespace, calibration: Calibration | None) -> Cluster:
    """The machine: a data sheet, numbers by hand over it, measured ones over both."""
    by_hand = {
        "memory": arguments.gpu_memory_gib and arguments.gpu_memory_gib * GIB,
        "peak": arguments.peak_tflops and arguments.peak_tflops * 1e12,
        "memory_bandwidth": arguments.memory_bandwidth_gbs
        and arguments.memory_bandwidth_gbs * 1e9 * MEMORY_EFFICIENCY,
        "intra": arguments.intra_bandwidth_gbs
        and arguments.intra_bandwidth_gbs * 1e9 * arguments.link_efficiency,
        "inter": arguments.inter_bandwidth_gbs
        and arguments.inter_bandwidth_gbs * 1e9 * arguments.link_efficiency,
        "gpus_per_node": arguments.gpus_per_node,
    }
    given = {name: value for name, value in by_hand.items() if value is not None}
    always: dict[str, Any] = {
        "ranks": arguments.gpus,
        "latency": arguments.latency_us * 1e-6,
        "framework": arguments.framework_gib * GIB,
    }
    if calibration is not None:
        base = calibration.cluster
        if arguments.gpu is not None:
            sheet = cluster_of(
                known_gpu(arguments.gpu),
                arguments.gpus,
                link_efficiency=arguments.link_efficiency,
                name=arguments.gpu,
            )
            measured = {
                name: getattr(base, name)
                for name in ("memory_bandwidth", "measured_row_bandwidth", "intra")
            }
            base = replace(sheet, device=base.device, **measured)
        framework = 0.0 if base.device == "cpu" else always["framework"]
        measured_latency = calibration.cluster.latency or always["latency"]
        return replace(
            base,
            **{
                **given,
                "ranks": arguments.gpus,
                "framework": framework,
                "latency": measured_latency,
            },
        )
    if arguments.gpu is not None:
        return replace(
            cluster_of(
                known_gpu(arguments.gpu), arguments.gpus, link_efficiency=arguments.link_efficiency
            ),
            **given,
            **always,
            name=arguments.gpu,
        )
    missing = [name for name in by_hand if name not in given and name != "gpus_per_node"]
    if missing:
        raise ConfigError(
            f"say which --gpu ({', '.join(GPUS)}), or give --calibration, or all of its numbers by hand (missing: {missing[0]})"
        )
    return Cluster(**{"gpus_per_node": 8, **given, **always}, name="GPU")


def _config(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    if arguments.config is not None:
        words = [
            "--config",
            arguments.config,
            *(["--model.preset", arguments.preset] if arguments.preset else []),
            *overrides,
        ]
        config = load_config(words)
        if arguments.teacher_preset is None or config.teacher.enabled:
            return config
        return load_config(
            [*words, "--teacher.source", "online", "--teacher.checkpoint", arguments.teacher_preset]
        )
    defaults = {
        "--data.train": "none",
        "--batch.global_batch_size": "512",
        "--batch.micro_batch_size": "1",
        "--batch.sequence_length": "4096",
        "--optimizer.learning_rate": "1e-4",
        "--train.steps": "1",
        "--run.directory": "none",
        "--distill.tail": "bucket",
    }
    if arguments.preset is not None:
        defaults["--model.preset"] = arguments.preset
    if arguments.teacher_preset is not None:
        defaults |= {"--teacher.source": "online", "--teacher.checkpoint": arguments.teacher_preset}
    given = {word.partition("=")[0] for word in overrides if word.startswith("--")}
    if "--distill.num_draws" in given or "--distill.dense" in given:
        del defaults["--distill.tail"]
    return load_config(
        [word for key, value in defaults.items() if key not in given for word in (key, value)]
        + overrides
    )


def _teacher(arguments: argparse.Namespace, config: RunConfig) -> ModelSection | None:
    """Shape of the teacher. ConfigError where a run with a live one names none that can be read."""
    if arguments.teacher_preset is not None:
        try:
            return ModelSection.model_validate({"preset": arguments.teacher_preset})
        except ValueError as error:
            raise ConfigError(
                f"--teacher-preset: {error.errors()[0]['msg'] if hasattr(error, 'errors') else error}"
            ) from None
    if not config.teacher.enabled or config.teacher.checkpoint is None:
        return None
    from megatron_kd.checkpoint.store import find_checkpoint, read_info

    return read_info(
        find_checkpoint(config.teacher.checkpoint, what="teacher.checkpoint"),
        what="teacher.checkpoint",
    ).model_section()


def _teacher_name(arguments: argparse.Namespace, config: RunConfig) -> str:
    name = arguments.teacher_preset or config.teacher.checkpoint
    return f" from {name or 'a cache'}" if config.teacher.enabled else ""


def _tokenizer_size(config: RunConfig) -> int:
    from megatron_kd.data.tokenizer import load_tokenizer

    assert config.data.tokenizer is not None
    return load_tokenizer(config.data.tokenizer)[1].vocab_size


def _notes(
    arguments: argparse.Namespace,
    job: Job,
    cluster: Cluster,
    rates: Rates,
    calibration: Calibration | None,
) -> list[str]:
    batch = job.config.batch
    tokens = batch.global_batch_size * batch.sequence_length
    notes = [
        f"{batch.global_batch_size} sequences of {batch.sequence_length} tokens a step ({tokens / 1e6:.2f} million tokens)"
    ]
    if calibration is None:
        notes.append(
            f"assumed: student {rates.student / 1e12:.0f}, teacher {rates.teacher / 1e12:.0f} TFLOP/s a GPU while they compute; links "
            f"{cluster.intra / 1e9:.0f} GB/s in a node, {cluster.inter / 1e9:.0f} GB/s between; {cluster.framework / GIB:g} GiB framework"
        )
    else:
        settings = calibration.settings
        notes.append(
            f"measured ({calibration.device}, student {settings['hidden']} wide, teacher {settings['teacher_hidden']}): student "
            f"{rates.student / 1e9:,.0f}, teacher {rates.teacher / 1e9:,.0f} GFLOP/s a rank while they compute; link "
            f"{cluster.intra / 1e9:.2f} GB/s, {cluster.latency * 1e6:.0f} microseconds"
        )
    notes.append(
        "not in it: data loading, evaluation, checkpoints, failures; activations of the GPU's fused layers are a model, not a measurement"
    )
    return notes


def _budget(
    arguments: argparse.Namespace, job: Job, cluster: Cluster, rates: Rates, best: Plan
) -> Budget:
    """The best layout against a cached teacher's best: stored by the teacher alone, read by the student alone."""
    section = job.config.teacher.model_copy(
        update={"source": "cached", "cache": "none", "on_miss": "error"}
    )
    cached = replace(job, config=job.config.model_copy(update={"teacher": section}))
    online = best if job.lives else search(_live(job), cluster, rates).plans[0]
    student = search(cached, cluster, rates, keep=1).plans[0]
    teacher_only = online.time.parts["teacher"]
    per_token = arguments.cache_bytes_per_token or assumed_bytes_per_token(
        job.config, arguments.cache_entries
    )
    seconds = Steps(
        tokens=online.time.tokens,
        online=online.time.seconds,
        teacher=teacher_only + online.time.parts["exchange"],
        cached=student.time.seconds,
        extraction=teacher_only,
    )
    return budget(
        seconds,
        cluster,
        tokens=arguments.tokens,
        readers=student.job.config.parallel.tensor,
        bytes_per_token=per_token,
        students=arguments.students,
        prices=Prices(arguments.price_per_gpu_hour, arguments.price_per_tib_month),
    )


def _live(job: Job) -> Job:
    """The same with its teacher running."""
    return replace(
        job,
        config=job.config.model_copy(
            update={"teacher": job.config.teacher.model_copy(update={"source": "online"})}
        ),
    )


# --- calibrate ----------------------------------------------------------------------------------------------------------------------------


def _calibrate(words: list[str]) -> str:
    """Measure on this machine and write the file; what it says of a run that was not used is the check."""
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
    links = _torchrun(arguments.ranks, ["measure_links.py", *device, "--json"])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "step.json"
        _torchrun(
            arguments.ranks,
            ["bench_step.py", *device, *options, "--output", str(result)],
            output=result,
        )
        step = json.loads(result.read_text(encoding="utf-8"))
    found = {
        "kind": KIND,
        "device": step["device"],
        "versions": step["versions"],
        "commit": step["commit"],
        **{
            name: links[name]
            for name in ("world", "latency", "intra_bandwidth", "memory_bandwidth", "row_bandwidth")
        },
        "settings": {
            name: value
            for name, value in step["settings"].items()
            if name not in ("output", "json")
        },
        "runs": bench_runs(step, arguments.ranks),
    }
    made = calibrate(found)
    write_atomically(arguments.output, (json.dumps(found, indent=2) + "\n").encode())
    lines = [
        f"student {made.rates.student / 1e9:,.1f} GFLOP/s a rank, teacher {made.rates.teacher / 1e9:,.1f}, while they compute"
    ]
    for run in found["runs"]:
        if run["kind"] == "online":
            predicted = made.predict(bench_job(found["settings"], run, made.cluster.device)).seconds
            lines.append(
                f"the online step, not used: predicted {predicted:.3f} s, measured {run['seconds']['median']:.3f} s"
            )
    return "\n".join([*lines, f"written: {arguments.output}"])


def _torchrun(ranks: int, words: list[str], *, output: Path | None = None) -> Any:
    """A tool of this folder on `ranks` processes; the JSON it prints last, or nothing where it writes `output`. ConfigError if it fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(TOOLS / words[0]),
    ]
    done = subprocess.run([*command, *words[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0 or (output is not None and not output.is_file()):
        last = (
            [line for line in done.stderr.splitlines() if "error" in line.lower()]
            or done.stderr.splitlines()
            or ["no message"]
        )
        raise ConfigError(f"{words[0]} failed on {ranks} ranks: {last[0]}")
    return None if output is not None else json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
