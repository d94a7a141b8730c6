"""Wrap megatron-core's optimizer, and check the gradient norm before any weight changes."""

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
    """Run Adam on fp32 main weights, and skip an update whose gradient norm is not finite.

    megatron-core checks for infinities only under fp16 loss scaling. In bf16 and fp32 it would
    apply them.
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
        """Return the optimizers that megatron-core chains: one, without experts."""
        return getattr(self.inner, "chained_optimizers", [self.inner])

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate and the run's weight decay of the next update."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
            # megatron-core leaves this to its scheduler. Without it, norms and biases would decay
            # like all other weights.
            group["weight_decay"] = self.weight_decay * group["wd_mult"]

    @torch.no_grad()
    def step(self, *, allowed: bool = True) -> tuple[bool, float]:
        """Clip and apply the gradients.

        Args:
            allowed: False to skip the update; the same on every rank.

        Returns:
            True if the weights were updated, and the global gradient norm before clipping. A norm
            that is not finite skips the update. It is the same on every rank, so all ranks update
            or none.

        Collectives:
            One reduction of the norm.
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
        """Drop the gradients that Adam holds.

        They alias the gradient buffers, and the next backward pass would add them twice.
        """
        self.inner.zero_grad()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Adapt megatron-core's distributed optimizer to torch's Adam while saved state is loaded.

        Fused optimizers keep one `step` tensor per group, torch's Adam one per parameter. Hence:
        the state must exist before it can be described; state from another layout comes without
        `step`, which is stored once and set from there; and the tensor that was set is shared by
        all parameters and must be copied, or every update would advance it once per parameter.
        """
        parts = [part for part in self.parts if isinstance(part, DistributedOptimizer)]
        for part in parts:
            if not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
            part._set_main_param_and_optimizer_states = _set_states_with_step(part)
        try:
            yield
        finally:
            for part in parts:
                del part._set_main_param_and_optimizer_states
                for state in part.optimizer.state.values():
                    if isinstance(state.get("step"), torch.Tensor):
                        state["step"] = state["step"].clone()


def _set_states_with_step(part: DistributedOptimizer) -> Any:
    """Return a method that sets the states of a parameter and keeps its `step` if none is given."""
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        original(model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    return set_states
