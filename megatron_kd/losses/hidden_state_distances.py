"""How far a hidden state of the student is from the teacher's, token by token.

Shapes: S tokens, B sequences, H width. Both are the residual stream after a layer, of the same width (projected where not).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

HiddenDistance = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_i (student_i - teacher_i)^2 / H: [S, B, H] twice -> [S, B] fp32."""
    return (student.float() - teacher.float()).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - student . teacher / (|student| |teacher|), in [0, 2]: [S, B, H] twice -> [S, B] fp32."""
    return 1.0 - cosine_similarity(student.float(), teacher.float(), dim=-1)


HIDDEN_DISTANCES: dict[str, HiddenDistance] = {"mse": mean_squared_error, "cosine": cosine_distance}
