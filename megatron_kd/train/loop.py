"""The loop: step, log, maybe evaluate, maybe save."""

from __future__ import annotations

import torch

from megatron_kd.config import dump_toml
from megatron_kd.models.config import DTYPES
from megatron_kd.parallel.groups import seed_step
from megatron_kd.telemetry.flops import flops_per_token, measure_peak_tflops, peak_tflops
from megatron_kd.telemetry.progress import Progress
from megatron_kd.telemetry.throughput import Stopwatch
from megatron_kd.telemetry.writer import RunWriter, State
from megatron_kd.train.build import Run
from megatron_kd.train.capture import CaptureError
from megatron_kd.train.evaluate import evaluate
from megatron_kd.train.step import StepReport, train_step


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite and the policy says stop. No weight was changed by that step."""


def train(run: Run) -> None:
    """Train to train.steps from wherever `run` stands. Collective over the world; NonFiniteError and CaptureError on every rank alike."""
    config, progress = run.config, run.progress
    first = run.groups.rank == 0
    with RunWriter(config.run.directory, tensorboard=config.telemetry.tensorboard, enabled=first) as writer:
        writer.write_config(dump_toml(config))
        writer.begin(step=progress.step, steps=config.train.steps)
        bar = Progress(config.telemetry.progress, steps=config.train.steps, start_step=progress.step, enabled=first)
        try:
            _loop(run, writer, bar)
            writer.status("finished", step=progress.step)
        except BaseException as error:
            state: State = "stopped" if isinstance(error, NonFiniteError | CaptureError) else "failed"
            writer.status(state, step=progress.step, message=str(error)[:500])
            raise
        finally:
            bar.close()
            run.capture.close()


def _loop(run: Run, writer: RunWriter, bar: Progress) -> None:
    config, progress = run.config, run.progress
    watch = _stopwatch(run)
    saved = progress.step
    while progress.step < config.train.steps:
        seed_step(config.train.seed, progress.step, run.groups)
        report = train_step(run)
        watch.add(config.batch.global_batch_size * config.batch.sequence_length)
        _stop_if_not_finite(run, report)
        if progress.step % config.telemetry.log_interval == 0 or progress.step == config.train.steps:
            _log(run, report, watch, writer, bar)
        with watch.pause():
            if _due(progress.step, config.train.evaluate_interval, config.train.steps):
                _evaluate(run, writer, bar)
            if _due(progress.step, config.checkpoint.interval, config.train.steps):
                run.save()
                saved = progress.step
    assert saved == progress.step


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _log(run: Run, report: StepReport, watch: Stopwatch, writer: RunWriter, bar: Progress) -> None:
    lap, metrics, progress = watch.lap(), report.metrics, run.progress
    named = {name: value for name, value in metrics.items() if name != "tokens"}
    writer.row(
        {
            "step": progress.step,
            **named,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "alpha": report.alpha,
            "tokens": progress.consumed_tokens,
            "samples": progress.consumed_samples,
            "loss_tokens": metrics["tokens"],
            "nonfinite_steps": progress.nonfinite_steps,
            "tokens_per_second": lap.tokens_per_second,
            "tflops_per_device": lap.tflops_per_device,
            "mfu": lap.mfu,
        }
    )
    bar.update(progress.step, loss=metrics["ce_loss"], kd=metrics["kd_loss"], tokens_per_second=lap.tokens_per_second)


def _evaluate(run: Run, writer: RunWriter, bar: Progress) -> None:
    for split, metrics in evaluate(run).items():
        named = {name: value for name, value in metrics.items() if name not in ("tokens", "total_loss")}
        writer.row(
            {"step": run.progress.step, "split": split, "tokens": run.progress.consumed_tokens, "loss_tokens": metrics["tokens"], **named}
        )
        bar.message(f"step {run.progress.step}  validation {split}  loss {metrics['ce_loss'] or float('nan'):.4f}")


def _stop_if_not_finite(run: Run, report: StepReport) -> None:
    if report.updated:
        return
    policy, count = run.config.train.nonfinite, run.progress.nonfinite_steps
    if policy == "stop" or count > run.config.train.max_nonfinite_steps:
        loss = report.metrics["total_loss"]
        raise NonFiniteError(
            f"step {run.progress.step}: loss {loss} and gradient norm {report.grad_norm} are not both finite ({count} such step(s) "
            f'so far); the weights were not changed and train.nonfinite = "{policy}" stops the run: look at the data and the '
            "learning rate"
        )


def _stopwatch(run: Run) -> Stopwatch:
    config, device = run.config, run.groups.platform.device
    size = config.batch.sequence_length
    flops = flops_per_token(config.model, run.inputs.vocab_size, size)
    teacher = run.inputs.teacher_model
    if teacher is not None:
        flops += flops_per_token(teacher, run.inputs.vocab_size, size, forward_only=True)
    peak = config.telemetry.peak_tflops
    if peak is None:
        named = run.groups.platform.is_cuda
        peak = peak_tflops(torch.cuda.get_device_name(device)) if named else measure_peak_tflops(DTYPES[config.train.precision])
    return Stopwatch(flops_per_token=flops, num_devices=run.groups.world_size, peak_tflops=peak)
