"""The program: `torchrun --nproc-per-node N -m megatron_kd.pretrain --config run.toml [--section.key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_kd.config import ConfigError, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run a run file. Returns 0 when it has finished, 2 for bad input, 1 when it stopped; the reason goes to stderr."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        # Checked inputs come first: torch and megatron-core take seconds to import, and --help needs neither.
        from megatron_kd.parallel.platform import check_apex, start_platform

        check_apex()
        start_platform(config.train.device)
        return _run(config)
    except ConfigError as error:
        print(f"megatron_kd: error: {error}", file=sys.stderr, flush=True)
        return 2


def _run(config: object) -> int:
    from megatron_kd.config import RunConfig
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.loop import NonFiniteError, train

    assert isinstance(config, RunConfig)
    try:
        train(build_run(config))
    except NonFiniteError as error:
        print(f"megatron_kd: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        stop_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
