"""The device a run uses. Where there is no CUDA, megatron-core runs on CPU and gloo through the stand-ins below.

megatron-core says `device="cuda"`, asks `torch.cuda` for streams and RNG states, and knows a tensor by its type's name. On the
CPU platform those few names answer for the CPU; nothing is installed where CUDA is used. Everything that had to be stood in
for is in this file, so that a new release of megatron-core is checked against one page.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

import torch

from megatron_kd.config import ConfigError

_FACTORIES = (
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)


# Of NCCL's algorithms, those that sum in an order that follows from the ranks alone.
_REPEATABLE = {"Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"}


@dataclass(frozen=True)
class Platform:
    """Where tensors live and what carries collectives. deterministic: operations that may differ from run to run raise an error."""

    device: torch.device
    backend: str
    deterministic: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"


def start_platform(device: str, local_rank: int = 0, *, deterministic: bool = False) -> Platform:
    """The platform for train.device ("auto", "cuda", "cpu"); on CPU it prepares megatron-core. ConfigError without the device."""
    check_apex()
    _set_deterministic(deterministic)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'train.device = "cuda", but torch finds no CUDA device here: set train.device = "cpu" or "auto"'
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        quiet_megatron()
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} found): start fewer processes"
            )
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl", deterministic)
    use_cpu()
    return Platform(torch.device("cpu"), "gloo", deterministic)


def _set_deterministic(wanted: bool) -> None:
    if wanted:
        # NVLS sums in switches, in whatever order messages arrive.
        chosen = os.environ.setdefault("NCCL_ALGO", "^NVLS")
        if not {name.strip() for name in chosen.split(",")} <= _REPEATABLE:
            raise ConfigError(
                f"train.deterministic = true, but NCCL_ALGO = {chosen!r} may sum in another order each time: unset it, or choose from "
                f"{', '.join(sorted(_REPEATABLE))}"
            )
        # Read when the libraries make their handles: cuBLAS's workspace, Transformer Engine's choice of attention.
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
        # Filling fresh memory finds mistakes, not differences.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)


def check_apex() -> None:
    """ConfigError when a package called apex that is not NVIDIA's is importable: megatron-core would take it for NVIDIA's."""
    found = importlib.util.find_spec("apex")
    # Not `find_spec("apex.normalization")`, which runs the package it looks into and leaves it imported.
    if (
        found is not None
        and PathFinder.find_spec("apex.normalization", found.submodule_search_locations) is None
    ):
        raise ConfigError(
            "an importable package named 'apex' is not NVIDIA's apex (it has no apex.normalization) and breaks megatron-core: "
            "remove it with `pip uninstall apex` (the package index's apex is another project)"
        )


def quiet_megatron() -> None:
    """Import megatron-core without its notices about optional packages, and keep its loggers to errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf.*"
    )
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|megatron\.core"
    )
    for text in (
        "When using async grad allreduce",
        "When using sequence parallelism",
        "`sequence_parallel` is set",
        "full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f"{text}.*")


@functools.cache
def use_cpu() -> None:
    """Let megatron-core run on CPU in this process. Once; there is no way back, and none is needed."""
    # torch reads it at its first large allocation. Without huge pages a fifth of the time of a large product into new memory
    # goes into page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    real_compile = torch.compile
    # Its small fused functions are not worth a C++ compiler and a minute: they stay the plain Python they were written as.
    torch.compile = lambda function=None, **_options: function or (lambda inner: inner)  # type: ignore[assignment]
    try:
        quiet_megatron()
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = real_compile
    # The optimizers import it, and it lists torch's functions when it is: it must see them before the stand-ins.
    importlib.import_module("torch._dynamo")

    _stand_in_for_torch_cuda()
    _send_cuda_devices_to_cpu()
    _keep_rng_on_cpu()


def _stand_in_for_torch_cuda() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    for name in (
        "synchronize",
        "set_device",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
    ):
        setattr(torch.cuda, name, _nothing)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_a, **_k: (
        torch.get_rng_state()
    )
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *_a, **_k: (
        torch.set_rng_state(state)
    )
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_a, **_k: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda *_a, **_k: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    torch.Tensor.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]


def _send_cuda_devices_to_cpu() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return make

    # `with torch.device("meta"):` knows factories from a list made at its first use: it must see the real ones, or models that are
    # built under it (transformers does) come out half on the CPU and keep uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    real_type = torch.Tensor.type

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers sort parameters by names such as torch.cuda.FloatTensor and refuse all others.
        answer = real_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = named_type  # type: ignore[method-assign, assignment]


def _keep_rng_on_cpu() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_a, **_k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)
    # Here the CPU generator is the tracked one, so its moving inside a fork is the point, not a slip.
    random.logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands for what has no meaning without a GPU."""


class _Stream:
    """A stream or event that is always done."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.wait_stream = self.synchronize = self.wait_event = self.record = self.wait = _nothing

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_args: Any) -> None:
        return None
