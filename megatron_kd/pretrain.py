"""The program: `torchrun --nproc-per-node N -m megatron_kd.pretrain --config run.toml [--section.key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.train.inputs import check_inputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run a run file. Returns 0 when it has finished; the reason for anything else goes to stderr.

    1: stopped by a number that is not finite. 2: bad input. 5: what it captures could not be written.
    """
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        _, world_size, local_rank = world_from_environment()
        # Bad input is found before torch and megatron-core, which take seconds to import.
        check_inputs(config, world_size=world_size)
        return _run(config, local_rank)
    except ConfigError as error:
        print(f"megatron_kd: error: {error}", file=sys.stderr, flush=True)
        return 2


def _run(config: RunConfig, local_rank: int) -> int:
    from megatron_kd.parallel.platform import start_platform

    # Before anything else imports megatron-core: on a CPU it must be imported prepared.
    start_platform(config.train.device, local_rank)
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.capture import CaptureError
    from megatron_kd.train.loop import NonFiniteError, train

    try:
        train(build_run(config))
    except NonFiniteError as error:
        print(f"megatron_kd: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except CaptureError as error:
        print(f"megatron_kd: stopped: {error}", file=sys.stderr, flush=True)
        return 5
    finally:
        stop_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
