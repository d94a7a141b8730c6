"""The program: `torchrun --nproc-per-node N -m megatron_kd.pretrain --config run.toml [--section.key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import (
    BAD_INPUT,
    DO_NOT_RESTART,
    FAILED,
    FINISHED,
    REQUEUE,
    WRITE_FAILED,
)
from megatron_kd.train.startup.packages import check_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run a run file. The exit code says what to do next; the reason goes to stderr and to status.json.

    0: finished. 85: saved and left in the middle as it was asked to, start it again. 93: do not start it again by itself: a number was
    not finite, the loss jumped, or the file `stop` asked for it. 2: bad input. 5: a checkpoint, or what it captures, could not be
    written. Anything else, such as the loss of another rank (1): a failure that may pass.
    """
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        check_packages()
        from megatron_kd.train.startup.input_checks import check_inputs

        _, world_size, local_rank = world_from_environment()
        # Bad input is found before torch and megatron-core, which take seconds to import.
        check_inputs(config, world_size=world_size)
        return _run(config, local_rank)
    except ConfigError as error:
        print(f"megatron_kd: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _run(config: RunConfig, local_rank: int) -> int:
    from megatron_kd.checkpoint.store import CheckpointError
    from megatron_kd.parallel.platform import start_platform

    # Before anything else imports megatron-core: on a CPU it must be imported prepared.
    start_platform(config.train.device, local_rank)
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.parallel.watchdog import LostRankError
    from megatron_kd.train.build import build_run
    from megatron_kd.train.capture import CaptureError
    from megatron_kd.train.guards import LossSpikeError
    from megatron_kd.train.loop import NonFiniteError, train
    from megatron_kd.train.shutdown import Action, ShutdownRequest

    leaving = ShutdownRequest(
        config.run.directory,
        minutes=config.train.minutes,
        watches_file=world_from_environment()[0] == 0,
    )
    try:
        request = train(build_run(config), leaving)
        if request:
            print(f"megatron_kd: saved and left: {leaving.reason}", file=sys.stderr, flush=True)
        return {Action.REQUEUE: REQUEUE, Action.STOP: DO_NOT_RESTART}.get(request, FINISHED)
    except (NonFiniteError, LossSpikeError, CaptureError, CheckpointError, LostRankError) as error:
        print(f"megatron_kd: stopped: {error}", file=sys.stderr, flush=True)
        return {
            NonFiniteError: DO_NOT_RESTART,
            LossSpikeError: DO_NOT_RESTART,
            CaptureError: WRITE_FAILED,
            CheckpointError: WRITE_FAILED,
        }.get(type(error), FAILED)
    finally:
        stop_groups()


if __name__ == "__main__":
    sys.exit(main())
