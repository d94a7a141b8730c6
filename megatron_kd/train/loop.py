"""The loop: step, log, maybe evaluate, maybe save."""

from __future__ import annotations

import contextlib

import torch

from megatron_kd.checkpoint.store import CheckpointError
from megatron_kd.config import ConfigError, dump_toml
from megatron_kd.models.transformer_config import DTYPES
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.parallel.groups import seed_step
from megatron_kd.planning.flops import (
    flops_per_token,
    measure_peak_tflops,
    peak_tflops,
    projection_flops_per_token,
)
from megatron_kd.storage.directory_lock import DirectoryLock
from megatron_kd.telemetry.progress_bar import Progress
from megatron_kd.telemetry.run_files import RunWriter, State
from megatron_kd.telemetry.throughput import Stopwatch
from megatron_kd.train.build import Run
from megatron_kd.train.capture import CaptureError
from megatron_kd.train.evaluate import evaluate
from megatron_kd.train.guards import DataGuard, LossSpikeError, SpikeGuard
from megatron_kd.train.shutdown import Action, NoShutdown, ShutdownRequest
from megatron_kd.train.startup.resume import settle
from megatron_kd.train.step import StepReport, train_step


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite and the policy says stop. No weight was changed by that step."""


def train(run: Run, leaving: ShutdownRequest | None = None) -> Action:
    """Train to train.steps from wherever `run` stands, or until `leaving` asks to go. Collective over the world.

    Returns CONTINUE when finished, else what was asked for; the run is saved then. NonFiniteError, LossSpikeError, CaptureError and
    CheckpointError on every rank alike, ConfigError where another run has the directory; LostRankError where another rank is missing (see
    `Watchdog`, which may also end the process).
    """
    lock = _hold(run)
    try:
        request = _train(run, leaving or NoShutdown())
    finally:
        run.saver.verifier.close()
        if lock is not None:
            lock.release()
    # Whoever returns may begin the next run in this directory: not before it is free.
    raise_together(None, ConfigError)
    return request


def _hold(run: Run) -> DirectoryLock | None:
    """This run directory for this run alone; rank 0 holds it. ConfigError on every rank where another run does."""
    held: list[DirectoryLock] = []

    def take() -> str | None:
        lock = DirectoryLock(run.config.run.directory)
        held.append(lock)
        return None if lock.took_over is None else str(lock.took_over)

    try:
        left = from_rank_zero(take)
    except OSError as error:
        raise ConfigError(
            f"run.directory: {error.filename or run.config.run.directory}: {error.strerror}: it cannot be written"
        ) from error
    if not held:
        return None
    run.saver.check = held[0].check
    if left is not None:
        run.saver.log.warn(
            "took over",
            run.progress.step,
            f"{run.config.run.directory} was held by {left}, which is gone: going on",
        )
    settle(run.inputs, run.saver)
    return held[0]


def _train(run: Run, leaving: ShutdownRequest) -> Action:
    config, progress = run.config, run.progress
    first = run.groups.rank == 0
    with RunWriter(
        config.run.directory, tensorboard=config.telemetry.tensorboard, enabled=first
    ) as writer:
        writer.write_config(dump_toml(config))
        writer.begin(step=progress.step, steps=config.train.steps)
        if run.inputs.passed_over:
            steps = ", ".join(str(step) for step, _ in run.inputs.passed_over)
            writer.status(
                "running",
                step=progress.step,
                message=f"damaged checkpoints were passed over: step {steps}",
            )
        bar = Progress(
            config.telemetry.progress,
            steps=config.train.steps,
            start_step=progress.step,
            enabled=first,
        )
        try:
            with run.groups.watchdog as watchdog:
                watchdog.on_lost = lambda sentence: writer.status(
                    "failed", step=progress.step, message=sentence
                )
                try:
                    request = _loop(run, writer, bar, leaving)
                except (NonFiniteError, LossSpikeError, CaptureError):
                    _flush_pending_checkpoint(run)
                    raise
            writer.status(
                _STATES[request], step=progress.step, message=leaving.reason if request else ""
            )
            leaving.acknowledge()
            return request
        except BaseException as error:
            known = NonFiniteError | LossSpikeError | CaptureError | CheckpointError
            state: State = "stopped" if isinstance(error, known) else "failed"
            # A disk that is full must not hide the reason why.
            with contextlib.suppress(OSError):
                writer.status(state, step=progress.step, message=str(error)[:500])
            raise
        finally:
            bar.close()
            run.capture.close()


def _flush_pending_checkpoint(run: Run) -> None:
    """Of a run that stops on every rank alike, the checkpoint that is being written is still worth having."""
    try:
        run.saver.finish(read_back=False)
    except CheckpointError as error:
        run.saver.log.warn("failed", run.progress.step, str(error))


_STATES: dict[Action, State] = {
    Action.CONTINUE: "finished",
    Action.REQUEUE: "requeue",
    Action.STOP: "stopped",
}


def _loop(run: Run, writer: RunWriter, bar: Progress, leaving: ShutdownRequest) -> Action:
    config, progress = run.config, run.progress
    watch = _stopwatch(run)
    saved = progress.step
    spikes, samples = (
        SpikeGuard(config.train.loss_spike, stops=config.train.on_loss_spike == "stop"),
        DataGuard(),
    )
    request = leaving.agree(run.groups.platform.device)
    while progress.step < config.train.steps and not request:
        seed_step(config.train.seed, progress.step, run.groups)
        report = train_step(run)
        watch.add(config.batch.global_batch_size * config.batch.sequence_length)
        _stop_if_not_finite(run, report)
        if (
            progress.step % config.telemetry.log_interval == 0
            or progress.step == config.train.steps
        ):
            late = samples.look(progress.step, _log(run, report, watch, writer, bar))
            if late is not None:
                bar.message(f"warning: {late}")
        spike = spikes.look(progress.step, report.metrics["total_loss"])
        if spike is not None:
            bar.message(f"warning: {spike}")
        request = leaving.agree(run.groups.platform.device)
        with watch.pause():
            # Whoever asks may not wait for an evaluation.
            if request and progress.step < config.train.steps:
                saved = _save(run)
                run.saver.finish(read_back=False)
            if _due(progress.step, config.train.evaluate_interval, config.train.steps):
                _evaluate(run, writer, bar)
            if (
                _due(progress.step, config.checkpoint.interval, config.train.steps)
                and saved != progress.step
            ):
                saved = _save(run)
            else:
                run.saver.poll()
    with watch.pause():
        # Whoever asks may not wait for what is written to be read back: the next start does that.
        run.saver.finish(read_back=not request)
    assert saved == progress.step
    return request if progress.step < config.train.steps else Action.CONTINUE


def _save(run: Run) -> int:
    run.groups.watchdog.enter_phase(
        "saving a checkpoint", limit_seconds=run.config.checkpoint.timeout_seconds
    )
    run.save()
    return run.progress.step


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _log(
    run: Run, report: StepReport, watch: Stopwatch, writer: RunWriter, bar: Progress
) -> dict[str, float | int]:
    """A row and a line; how long the ranks took."""
    lap, metrics, progress, times = watch.lap(), report.metrics, run.progress, run.times.spread()
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
            **times,
        }
    )
    bar.update(
        progress.step,
        loss=metrics["ce_loss"],
        kd=metrics["kd_loss"],
        tokens_per_second=lap.tokens_per_second,
    )
    return times


def _evaluate(run: Run, writer: RunWriter, bar: Progress) -> None:
    for split, metrics in evaluate(run).items():
        named = {
            name: value for name, value in metrics.items() if name not in ("tokens", "total_loss")
        }
        writer.row(
            {
                "step": run.progress.step,
                "split": split,
                "tokens": run.progress.consumed_tokens,
                "loss_tokens": metrics["tokens"],
                **named,
            }
        )
        bar.message(
            f"step {run.progress.step}  validation {split}  loss {metrics['ce_loss'] or float('nan'):.4f}"
        )


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
    flops = flops_per_token(config.model, run.inputs.vocab_size, size) + projection_flops_per_token(
        config.model, run.inputs.projections
    )
    teacher = run.inputs.teacher_model
    if teacher is not None:
        flops += flops_per_token(teacher, run.inputs.vocab_size, size, forward_only=True)
    peak = config.telemetry.peak_tflops
    if peak is None:
        named = run.groups.platform.is_cuda
        peak = (
            peak_tflops(torch.cuda.get_device_name(device))
            if named
            else measure_peak_tflops(DTYPES[config.train.precision])
        )
    return Stopwatch(flops_per_token=flops, num_devices=run.groups.world_size, peak_tflops=peak)
