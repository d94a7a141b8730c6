"""Run the training loop: step, log, evaluate, save."""

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
    peak_tflops,
    projection_flops_per_token,
)
from megatron_kd.storage.directory_lock import DirectoryLock
from megatron_kd.telemetry.progress_bar import ProgressBar
from megatron_kd.telemetry.run_files import RunWriter, State
from megatron_kd.telemetry.throughput import Stopwatch, measure_peak_tflops
from megatron_kd.train.build import Run
from megatron_kd.train.capture import CaptureError
from megatron_kd.train.evaluate import evaluate
from megatron_kd.train.guards import DataWaitGuard, LossSpikeError, SpikeGuard
from megatron_kd.train.shutdown import Action, NoShutdown, ShutdownRequest
from megatron_kd.train.startup.resume import reconcile_checkpoints
from megatron_kd.train.step import StepReport, train_step

_STATES: dict[Action, State] = {
    Action.CONTINUE: "finished",
    Action.REQUEUE: "requeue",
    Action.STOP: "stopped",
}


class NonFiniteError(RuntimeError):
    """Report that the loss or the gradient was not finite and the policy is to stop.

    The step changed no weight.
    """


def train(run: Run, shutdown: ShutdownRequest | None = None) -> Action:
    """Train from the run's current step to train.steps, or until a shutdown is requested.

    Collective over the world. All errors but LostRankError are raised on every rank alike.

    Returns:
        CONTINUE if the run is finished, else the requested action. The run is saved then.

    Raises:
        NonFiniteError: A number was not finite and train.nonfinite stops the run.
        LossSpikeError: The loss jumped and train.on_loss_spike stops the run.
        CaptureError: Captured targets could not be written.
        CheckpointError: A checkpoint could not be written.
        ConfigError: Another run has locked the directory.
        LostRankError: Another rank is missing. The watchdog may also end the process.
    """
    lock = _lock_directory(run)
    try:
        action = _train(run, shutdown or NoShutdown())
    finally:
        run.saver.verifier.close()
        if lock is not None:
            lock.release()
    # The caller may start the next run in this directory, so no rank returns before it is unlocked.
    raise_together(None, ConfigError)
    return action


def _lock_directory(run: Run) -> DirectoryLock | None:
    """Lock the run directory, and return the lock on rank 0.

    Raises:
        ConfigError: On every rank: another run has locked it, or it cannot be written.
    """
    directory = run.config.run.directory
    locks: list[DirectoryLock] = []

    def acquire() -> str | None:
        lock = DirectoryLock(directory)
        locks.append(lock)
        return None if lock.took_over is None else str(lock.took_over)

    try:
        lost_owner = from_rank_zero(acquire)
    except OSError as error:
        raise ConfigError(
            f"run.directory: {error.filename or directory}: {error.strerror}: it cannot be written"
        ) from error
    if not locks:
        return None
    run.saver.check = locks[0].check
    if lost_owner is not None:
        run.saver.log.warn(
            "took over",
            run.progress.step,
            f"{directory} was locked by {lost_owner}, which no longer runs: continuing",
        )
    reconcile_checkpoints(run.inputs, run.saver)
    return locks[0]


def _train(run: Run, shutdown: ShutdownRequest) -> Action:
    config, progress = run.config, run.progress
    is_first = run.groups.rank == 0
    with RunWriter(
        config.run.directory, tensorboard=config.telemetry.tensorboard, enabled=is_first
    ) as writer:
        _write_start(run, writer)
        bar = ProgressBar(
            config.telemetry.progress,
            steps=config.train.steps,
            start_step=progress.step,
            enabled=is_first,
        )
        with contextlib.closing(run.capture), contextlib.closing(bar):
            try:
                action = _watched_loop(run, writer, bar, shutdown)
                reason = shutdown.reason if action else ""
                writer.status(_STATES[action], step=progress.step, message=reason)
                shutdown.acknowledge()
            except BaseException as error:
                _write_failure(writer, progress.step, error)
                raise
    return action


def _write_start(run: Run, writer: RunWriter) -> None:
    writer.write_config(dump_toml(run.config))
    writer.begin(step=run.progress.step, steps=run.config.train.steps)
    if run.inputs.skipped_checkpoints:
        steps = ", ".join(str(step) for step, _ in run.inputs.skipped_checkpoints)
        writer.status(
            "running",
            step=run.progress.step,
            message=f"damaged checkpoints were skipped: step {steps}",
        )


def _write_failure(writer: RunWriter, step: int, error: BaseException) -> None:
    is_stop = isinstance(error, NonFiniteError | LossSpikeError | CaptureError | CheckpointError)
    # An error of this write, such as a full disk, must not hide the reason of the failure.
    with contextlib.suppress(OSError):
        writer.status("stopped" if is_stop else "failed", step=step, message=str(error)[:500])


def _watched_loop(
    run: Run, writer: RunWriter, bar: ProgressBar, shutdown: ShutdownRequest
) -> Action:
    """Run the loop under the watchdog."""
    with run.groups.watchdog as watchdog:
        watchdog.on_lost = lambda message: writer.status(
            "failed", step=run.progress.step, message=message
        )
        try:
            return _loop(run, writer, bar, shutdown)
        except (NonFiniteError, LossSpikeError, CaptureError):
            _flush_pending_checkpoint(run)
            raise


def _flush_pending_checkpoint(run: Run) -> None:
    """On a coordinated stop, finish the checkpoint that is being written."""
    try:
        run.saver.finish(read_back=False)
    except CheckpointError as error:
        run.saver.log.warn("failed", run.progress.step, str(error))


def _loop(run: Run, writer: RunWriter, bar: ProgressBar, shutdown: ShutdownRequest) -> Action:
    config, progress, device = run.config, run.progress, run.groups.platform.device
    stopwatch = _stopwatch(run)
    spike_guard = SpikeGuard(config.train.loss_spike, stops=config.train.on_loss_spike == "stop")
    data_guard = DataWaitGuard()
    saved_step = progress.step
    action = shutdown.agree(device)
    while progress.step < config.train.steps and not action:
        seed_step(config.train.seed, progress.step, run.groups)
        report = train_step(run)
        stopwatch.add(config.batch.global_batch_size * config.batch.sequence_length)
        _check_finite(run, report)
        if _is_due(progress.step, config.telemetry.log_interval, config.train.steps):
            times = _log(run, report, stopwatch, writer, bar)
            _show(bar, data_guard.check(progress.step, times))
        _show(bar, spike_guard.check(progress.step, report.metrics["total_loss"]))
        action = shutdown.agree(device)
        with stopwatch.pause():
            saved_step = _evaluate_and_save(run, writer, bar, saved_step, stops=bool(action))
    with stopwatch.pause():
        # A time limit may not allow reading the checkpoint back. The next start verifies it.
        run.saver.finish(read_back=not action)
    assert saved_step == progress.step
    return action if progress.step < config.train.steps else Action.CONTINUE


def _show(bar: ProgressBar, warning: str | None) -> None:
    if warning is not None:
        bar.message(f"warning: {warning}")


def _evaluate_and_save(
    run: Run, writer: RunWriter, bar: ProgressBar, saved_step: int, *, stops: bool
) -> int:
    """Evaluate and save if they are due after this step, and return the last saved step."""
    config, step = run.config, run.progress.step
    if stops and step < config.train.steps:
        # Save before evaluating: the time limit may not allow both.
        saved_step = _save(run)
        run.saver.finish(read_back=False)
    if _is_due(step, config.train.evaluate_interval, config.train.steps):
        _evaluate(run, writer, bar)
    if _is_due(step, config.checkpoint.interval, config.train.steps) and saved_step != step:
        return _save(run)
    run.saver.poll()
    return saved_step


def _save(run: Run) -> int:
    run.groups.watchdog.enter_phase(
        "saving a checkpoint", limit_seconds=run.config.checkpoint.timeout_seconds
    )
    run.save()
    return run.progress.step


def _is_due(step: int, interval: int, last_step: int) -> bool:
    return step == last_step or (interval > 0 and step % interval == 0)


def _log(
    run: Run, report: StepReport, stopwatch: Stopwatch, writer: RunWriter, bar: ProgressBar
) -> dict[str, float | int]:
    """Write one record of metrics and update the progress bar; return the times of the ranks."""
    lap, metrics, progress = stopwatch.lap(), report.metrics, run.progress
    times = run.times.spread()
    writer.write_metrics(
        {
            "step": progress.step,
            **metrics,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "alpha": report.alpha,
            "tokens": progress.consumed_tokens,
            "samples": progress.consumed_samples,
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


def _evaluate(run: Run, writer: RunWriter, bar: ProgressBar) -> None:
    for split, metrics in evaluate(run).items():
        reported = {name: value for name, value in metrics.items() if name != "total_loss"}
        writer.write_metrics(
            {
                "step": run.progress.step,
                "split": split,
                "tokens": run.progress.consumed_tokens,
                **reported,
            }
        )
        loss = metrics["ce_loss"] or float("nan")
        bar.message(f"step {run.progress.step}  validation {split}  loss {loss:.4f}")


def _check_finite(run: Run, report: StepReport) -> None:
    """Raise NonFiniteError if the step was skipped and the policy allows no more such steps."""
    if report.updated:
        return
    policy, count = run.config.train.nonfinite, run.progress.nonfinite_steps
    if policy == "stop" or count > run.config.train.max_nonfinite_steps:
        loss = report.metrics["total_loss"]
        raise NonFiniteError(
            f"step {run.progress.step}: loss {loss} and gradient norm {report.grad_norm} are not "
            f"both finite ({count} such step(s) so far); the weights were not changed and "
            f'train.nonfinite = "{policy}" stops the run: check the data and the learning rate'
        )


def _stopwatch(run: Run) -> Stopwatch:
    config, length = run.config, run.config.batch.sequence_length
    flops = flops_per_token(config.model, run.inputs.vocab_size, length)
    flops += projection_flops_per_token(config.model, run.inputs.projections)
    teacher = run.inputs.teacher.model
    if teacher is not None:
        flops += flops_per_token(teacher, run.inputs.vocab_size, length, forward_only=True)
    peak = config.telemetry.peak_tflops
    if peak is None:
        platform = run.groups.platform
        peak = (
            peak_tflops(torch.cuda.get_device_name(platform.device))
            if platform.is_cuda
            else measure_peak_tflops(DTYPES[config.train.precision])
        )
    return Stopwatch(flops_per_token=flops, num_devices=run.groups.world_size, peak_tflops=peak)
