"""megatron-core's optimizer, with a look at the gradient norm before any weight moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_kd.config import RunConfig
from megatron_kd.models.student import Student


class Optimizer:
    """Adam on fp32 main weights. `step` leaves the weights alone when the gradient norm is not finite.

    megatron-core looks for infinities only under fp16 loss scaling; in bf16 and fp32 it would apply them.
    """

    def __init__(self, run: RunConfig, student: Student) -> None:
        section = run.optimizer
        self.clip_grad, self.weight_decay = section.clip_grad, section.weight_decay
        config = OptimizerConfig(
            optimizer="adam",
            lr=section.learning_rate,
            min_lr=section.min_learning_rate,
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            bf16=run.train.precision == "bf16",
            params_dtype=student.config.params_dtype,
            use_distributed_optimizer=section.distributed,
            clip_grad=section.clip_grad,
            overlap_param_gather=run.parallel.overlap_param_gather,
        )
        self.inner: Any = get_megatron_optimizer(
            config,
            student.chunks,
            use_gloo_process_groups=False,
            pg_collection=student.groups.collection,
        )

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """The optimizers megatron-core chains (one, without experts)."""
        return getattr(self.inner, "chained_optimizers", [self.inner])

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use `learning_rate`, and the run's weight decay, from the next step on."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
            # megatron-core leaves this to its own scheduler; without it norms and biases would decay like everything else.
            group["weight_decay"] = self.weight_decay * group["wd_mult"]

    @torch.no_grad()
    def step(self, *, allowed: bool = True) -> tuple[bool, float]:
        """Clip and apply the gradients: (whether the weights moved, the global gradient norm before clipping).

        They stay where `allowed` is False (equal on every rank) or the norm is not finite; the norm is the same on every
        rank, so all move or none. Collective: one reduction of the norm.
        """
        for part in self.parts:
            part.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not allowed or not math.isfinite(norm):
            return False, norm
        for part in self.parts:
            if self.clip_grad > 0 and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.clip_grad, norm, False)
            part.step_with_ready_grads()
        return True, norm

    def zero_grad(self) -> None:
        """Forget the gradients handed to Adam: they alias the buffers, and the next backward would add them twice."""
        self.inner.zero_grad()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Entered while saved state is read and loaded: what megatron-core's distributed optimizer misses for torch's Adam.

        torch keeps a `step` tensor per parameter where fused optimizers keep one per group. So the state must exist before it
        can be described; state from another layout comes without `step` (it is stored once and set from there); and what is
        set is one tensor for all parameters, which every update would then advance once for each of them.
        """
        parts = [part for part in self.parts if isinstance(part, DistributedOptimizer)]
        for part in parts:
            if not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
            part._set_main_param_and_optimizer_states = _keeping_step(part)
        try:
            yield
        finally:
            for part in parts:
                del part._set_main_param_and_optimizer_states
                for state in part.optimizer.state.values():
                    if isinstance(state.get("step"), torch.Tensor):
                        state["step"] = state["step"].clone()


def _keeping_step(part: DistributedOptimizer) -> Any:
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        original(model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    return set_states
