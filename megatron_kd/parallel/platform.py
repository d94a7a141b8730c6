"""Choose the device of a run, and let megatron-core run on a CPU with gloo.

megatron-core passes `device="cuda"`, asks `torch.cuda` for streams and RNG states, and identifies a
tensor by the name of its type. On the CPU platform these functions are replaced by versions for the
CPU. With CUDA nothing is replaced. All replacements are in this file, so that a new release of
megatron-core has to be checked against one file only.
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


# Algorithms of NCCL whose order of summation depends on the ranks only.
_REPEATABLE = {"Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"}


@dataclass(frozen=True)
class Platform:
    """Name the device of tensors and the backend of collectives.

    Attributes:
        device: Device of this rank.
        backend: Backend of torch.distributed.
        deterministic: True if operations that may differ from run to run raise an error.
    """

    device: torch.device
    backend: str
    deterministic: bool = False

    @property
    def is_cuda(self) -> bool:
        """Return True for a GPU."""
        return self.device.type == "cuda"


def start_platform(device: str, local_rank: int = 0, *, deterministic: bool = False) -> Platform:
    """Select the device, and prepare megatron-core for it.

    Args:
        device: "auto", "cuda" or "cpu", as train.device. "auto" takes CUDA if torch finds it.
        local_rank: Number of this process on its machine, and of its GPU.
        deterministic: Raise an error in operations that may differ from run to run.

    Raises:
        ConfigError: The device does not exist, or NCCL_ALGO is not deterministic.
    """
    check_apex()
    _set_deterministic(deterministic)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'train.device = "cuda", but torch finds no CUDA device here: set train.device = "cpu" '
            'or "auto"'
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        quiet_megatron()
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU to itself "
                f"({torch.cuda.device_count()} found): start fewer processes"
            )
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl", deterministic)
    use_cpu()
    return Platform(torch.device("cpu"), "gloo", deterministic)


def _set_deterministic(deterministic: bool) -> None:
    if deterministic:
        # NVLS sums in switches, in the order in which messages arrive.
        algorithms = os.environ.setdefault("NCCL_ALGO", "^NVLS")
        if not {name.strip() for name in algorithms.split(",")} <= _REPEATABLE:
            raise ConfigError(
                f"train.deterministic = true, but NCCL_ALGO = {algorithms!r} may sum in another "
                f"order each time: unset it, or choose from {', '.join(sorted(_REPEATABLE))}"
            )
        # The libraries read them when they create their handles: cuBLAS its workspace,
        # Transformer Engine its choice of attention.
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
        # Filling new memory finds errors in programs, not differences between runs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def check_apex() -> None:
    """Raise ConfigError if a package named apex that is not NVIDIA's can be imported.

    megatron-core would take it for NVIDIA's.
    """
    spec = importlib.util.find_spec("apex")
    # `find_spec("apex.normalization")` would run the package and leave it imported.
    if (
        spec is not None
        and PathFinder.find_spec("apex.normalization", spec.submodule_search_locations) is None
    ):
        raise ConfigError(
            "an importable package named 'apex' is not NVIDIA's apex (it has no "
            "apex.normalization) and breaks megatron-core: remove it with `pip uninstall apex` "
            "(the package index's apex is another project)"
        )


def quiet_megatron() -> None:
    """Import megatron-core without notices about optional packages, and log its errors only."""
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
    """Let megatron-core run on the CPU in this process. This cannot be undone."""
    # torch reads it at its first large allocation. Without huge pages, a fifth of the time of a
    # large matrix product into new memory goes into page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    real_compile = torch.compile
    # Leave megatron-core's small fused functions in plain Python: compiling them would need a C++
    # compiler and a minute.
    torch.compile = _do_not_compile  # type: ignore[assignment]
    try:
        quiet_megatron()
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = real_compile
    # The optimizers import it, and it lists torch's functions on import. It must see them before
    # they are replaced.
    importlib.import_module("torch._dynamo")

    _replace_torch_cuda()
    _send_cuda_devices_to_cpu()
    _keep_rng_on_cpu()


def _do_not_compile(function: Any = None, **_options: Any) -> Any:
    """Replace torch.compile, as a decorator with or without options."""
    return function or (lambda inner: inner)


def _replace_torch_cuda() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    for name in (
        "synchronize",
        "set_device",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
    ):
        setattr(torch.cuda, name, _no_op)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_a, **_k: (
        torch.get_rng_state()
    )
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *_a, **_k: (
        torch.set_rng_state(state)
    )
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_a, **_k: _Stream()  # type: ignore[assignment]
    torch.cuda.default_stream = lambda *_a, **_k: _Stream()  # type: ignore[assignment]
    torch.cuda.stream = lambda *_a, **_k: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _no_op
    torch.Tensor.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]


def _send_cuda_devices_to_cpu() -> None:
    def with_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return create

    # `with torch.device("meta"):` lists the factories at its first use. It must list the original
    # ones. Otherwise models that are built under it, as in transformers, are half on the CPU and
    # keep uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, with_cpu(getattr(torch, name)))
    real_type = torch.Tensor.type

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers sort parameters by names such as torch.cuda.FloatTensor and reject others.
        result = real_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named_type  # type: ignore[method-assign, assignment]


def _keep_rng_on_cpu() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_a, **_k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)
    # Here the CPU generator is the tracked one, so its state is expected to change inside a fork.
    random.logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _no_op(*_args: Any, **_kwargs: Any) -> None:
    """Replace a function that has no meaning without a GPU."""


class _Stream:
    """Replace a stream or event. It is always complete."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.wait_stream = self.synchronize = self.wait_event = self.record = self.wait = _no_op

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_args: Any) -> None:
        return None
