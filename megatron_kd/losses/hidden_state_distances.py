"""Measure the distance of the student's hidden states from the teacher's, token by token.

Shapes: S tokens, B sequences, H width. Both are the residual stream after a layer, of the same
width (projected if the models differ).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

HiddenDistance = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return sum_i (student_i - teacher_i)^2 / H, fp32 [S, B], of two [S, B, H]."""
    return (student.float() - teacher.float()).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - student . teacher / (|student| |teacher|), fp32 [S, B] in [0, 2]."""
    return 1.0 - cosine_similarity(student.float(), teacher.float(), dim=-1)


HIDDEN_DISTANCES: dict[str, HiddenDistance] = {"mse": mean_squared_error, "cosine": cosine_distance}
