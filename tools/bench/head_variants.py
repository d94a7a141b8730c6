"""Hold the inputs of one output head, and describe a way to compute its loss."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_kd.targets import SparseTarget

# Largest relative error of a gradient, by the type of the inputs. Logits that are rounded to the
# inputs' type lose far more near the teacher, and megatron-core's fused cross-entropy returns its
# gradient in bf16, whatever the type of its input.
EXACT = {"fp32": 1e-4, "bf16": 2e-2}
ROUNDED_LOGITS = {"fp32": 1e-4, "bf16": 0.6}
ROUNDED_GRADIENT = {"fp32": 2e-2, "bf16": 0.6}

TOP_K_LOSS = "CE + KL(top-k || p)"
# Losses that are a distance from the teacher alone.
DISTANCES = ("KL", "JSD", "KL within top-k")
# What is computed without a gradient.
NO_GRADIENT = ("product", "targets")


@dataclass(frozen=True)
class HeadInputs:
    """Hold the inputs of one output head.

    N tokens, H hidden size, H_t the teacher's, V vocabulary size, K kept entries of the teacher.

    Attributes:
        hidden: [N, H], of one float type with the weights.
        weight: [V, H].
        labels: [N], int64.
        teacher_hidden: [N, H_t].
        teacher_weight: [V, H_t].
        target: The teacher's top K ids, selected in fp64, as a cache would hold them.
        alpha: Weight of the distillation loss.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: SparseTarget
    alpha: float

    @property
    def tokens(self) -> int:
        """Return N."""
        return self.labels.numel()

    @property
    def top_k(self) -> int:
        """Return K."""
        return self.target.indices.shape[1]

    def teacher_logits(self) -> Tensor:
        """Return the teacher's logits, [N, V], in the inputs' type."""
        with torch.no_grad():
            return self.teacher_hidden @ self.teacher_weight.t()


Call = Callable[[HeadInputs, Tensor, Tensor], Any]


@dataclass(frozen=True)
class HeadVariant:
    """Describe one way to compute a loss.

    Attributes:
        computes: The loss. "targets" (selecting the teacher's top entries) and "product" (the
            teacher's logits alone) have no gradient.
        teacher: "none", "cached" (the target is an input) or "online" (the teacher's product is
            part of the time).
        make: Imports what is needed and returns call(inputs, hidden, weight) -> mean loss.
        limits: Largest relative error of a gradient, by the type of the inputs.
        module: Module that must be importable.
        main_grad: Adds the gradient of the weight to weight.main_grad, which is an input.
        internal: Belongs to this project.
    """

    name: str
    computes: str
    teacher: str
    make: Callable[[torch.device], Call]
    limits: dict[str, float] = field(default_factory=lambda: EXACT)
    module: str | None = None
    needs_cuda: bool = False
    main_grad: bool = False
    internal: bool = False

    def limit(self, dtype: str, near: float) -> float:
        """Return the largest relative error of a gradient.

        The gradient of a distance alone is as small as the distance, but fp32 logits of 16 to 32
        have a resolution of 2e-6: an error of a few times that is no mistake.

        Args:
            dtype: Type of the inputs.
            near: Standard deviation of the student's logits from the teacher's.
        """
        limit = self.limits[dtype]
        return max(limit, 4 * 2**-19 / near) if self.computes in DISTANCES else limit

    def prepare(self, device: torch.device) -> Call:
        """Return the call.

        Raises:
            Unavailable: The variant cannot run on this machine.
        """
        if self.module and importlib.util.find_spec(self.module.split(".")[0]) is None:
            raise Unavailable("not installed")
        if self.needs_cuda and device.type != "cuda":
            raise Unavailable("needs CUDA")
        try:
            # The libraries warn about optional packages that are missing.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.make(device)
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"cannot be imported: {error}") from error


class Unavailable(Exception):  # noqa: N818, a state that is reported, not an error
    """Report why a variant cannot run on this machine."""
