"""Import what ranks need, once, in the server that they are forked from."""

import warnings

from megatron_kd.parallel.platform import use_cpu

use_cpu()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_kd.train.loop  # noqa: F401
