"""Train a student: `torchrun --nproc-per-node N -m megatron_kd.pretrain --config run.toml`.

Keys of the run file can be overridden on the command line as `--section.key value`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage import exit_codes
from megatron_kd.train.startup.packages import check_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run a run file and return the exit code (storage/exit_codes.py).

    The reason of a failure goes to stderr and to status.json.
    """
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        check_packages()
        from megatron_kd.train.startup.input_checks import check_inputs

        _, world_size, local_rank = world_from_environment()
        # Find bad input before importing torch and megatron-core, which takes seconds.
        check_inputs(config, world_size=world_size)
        return _run(config, local_rank)
    except ConfigError as error:
        print(f"megatron_kd: error: {error}", file=sys.stderr, flush=True)
        return exit_codes.BAD_INPUT


def _run(config: RunConfig, local_rank: int) -> int:
    from megatron_kd.checkpoint.store import CheckpointError
    from megatron_kd.parallel.platform import start_platform

    # Before any other import of megatron-core: on a CPU it must be prepared first.
    start_platform(config.train.device, local_rank)
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.parallel.watchdog import LostRankError
    from megatron_kd.train.build import build_run
    from megatron_kd.train.capture import CaptureError
    from megatron_kd.train.guards import LossSpikeError
    from megatron_kd.train.loop import NonFiniteError, train
    from megatron_kd.train.shutdown import Action, ShutdownRequest

    shutdown = ShutdownRequest(
        config.run.directory,
        minutes=config.train.minutes,
        watches_file=world_from_environment()[0] == 0,
    )
    try:
        action = train(build_run(config), shutdown)
    except (NonFiniteError, LossSpikeError) as error:
        return _stopped(error, exit_codes.DO_NOT_RESTART)
    except (CaptureError, CheckpointError) as error:
        return _stopped(error, exit_codes.WRITE_FAILED)
    except LostRankError as error:
        return _stopped(error, exit_codes.FAILED)
    finally:
        stop_groups()
    if action == Action.CONTINUE:
        return exit_codes.FINISHED
    print(f"megatron_kd: saved and stopped: {shutdown.reason}", file=sys.stderr, flush=True)
    return exit_codes.REQUEUE if action == Action.REQUEUE else exit_codes.DO_NOT_RESTART


def _stopped(error: Exception, exit_code: int) -> int:
    print(f"megatron_kd: stopped: {error}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
