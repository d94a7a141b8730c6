"""Define the scaling laws of plain and distilled pretraining (arXiv 2502.08606).

    supervised      L~(N, D)       = E + (A / N^alpha + B / D^beta)^gamma
    distillation    L_S(N, D, L_T) = L_T + L_T^-c0 (1 + (L_T / (L~ d1))^(1/f1))^(-c1 f1)
                                     (A' / N^alpha' + B' / D^beta')^gamma'

N: parameters without embeddings. D: tokens. L_T: the teacher's cross-entropy on the student's
validation data; the teacher's size does not enter. Losses are nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_kd.sweep.scaling.forms import (
    DISTILLATION_NAMES,
    SUPERVISED_NAMES,
    Array,
    log_distillation,
    log_supervised,
    to_coordinate,
)


@dataclass(frozen=True)
class SupervisedLaw:
    """Hold L~(N, D) = E + (A / N^alpha + B / D^beta)^gamma, nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Return the cross-entropy of models.

        Args:
            parameters: without embeddings.
            tokens: tokens of training; shapes are broadcast.
        """
        n, d = np.broadcast_arrays(
            np.log(np.asarray(parameters, float)), np.log(np.asarray(tokens, float))
        )
        value, _ = log_supervised(coordinates_of(self), n.ravel(), d.ravel())
        return np.exp(value).reshape(n.shape)


@dataclass(frozen=True)
class DistillationLaw:
    """Hold L_S(N, D, L_T) as in the module; coefficients here are the primed ones."""

    supervised: SupervisedLaw
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(
        self, parameters: Array | float, tokens: Array | float, teacher_loss: Array | float
    ) -> Array:
        """Return the cross-entropy of distilled students.

        Args:
            parameters: without embeddings.
            tokens: tokens of training.
            teacher_loss: the teacher's cross-entropy; shapes are broadcast.
        """
        arguments = (parameters, tokens, teacher_loss)
        n, d, t = np.broadcast_arrays(*(np.log(np.asarray(value, float)) for value in arguments))
        supervised, _ = log_supervised(coordinates_of(self.supervised), n.ravel(), d.ravel())
        value, _ = log_distillation(
            coordinates_of(self), n.ravel(), d.ravel(), t.ravel(), supervised
        )
        return np.exp(value).reshape(n.shape)

    def best_teacher_loss(self, parameters: float, tokens: float) -> float:
        """Return the teacher's loss for which this student's loss is lowest.

        A stronger teacher would be too far ahead of the student. The search covers losses from E,
        the lowest that any model reaches by the supervised law, to twice the student's own.
        """
        supervised = float(self.supervised.loss(parameters, tokens))
        low = math.log(max(self.supervised.E, 0.05 * supervised))
        high = math.log(2 * supervised)
        for _ in range(4):  # each round narrows a grid to the neighbours of its best point
            grid = np.linspace(low, high, 201)
            best = int(self.loss(parameters, tokens, np.exp(grid)).argmin())
            low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
        return math.exp((low + high) / 2)


# arXiv 2502.08606: 73 supervised and 697 distilled runs on English C4, students of 143M to 12.6B
# parameters, up to 512B tokens.
PUBLISHED_SUPERVISED = SupervisedLaw(
    E=1.220, A=3355.0, B=18186.0, alpha=0.408, beta=0.431, gamma=0.452
)
PUBLISHED_DISTILLATION = DistillationLaw(
    PUBLISHED_SUPERVISED,
    A=2243.0,
    B=24181.0,
    alpha=0.321,
    beta=0.637,
    gamma=0.764,
    c0=2.549,
    c1=522.6,
    f1=0.090,
    d1=1.315,
)


def coefficient_names(law: SupervisedLaw | DistillationLaw) -> tuple[str, ...]:
    """Return the names of a law's coefficients."""
    return SUPERVISED_NAMES if isinstance(law, SupervisedLaw) else DISTILLATION_NAMES


def coordinates_of(law: SupervisedLaw | DistillationLaw) -> Array:
    """Return the coefficients of a law as the forms take them."""
    return np.array([to_coordinate(name, getattr(law, name)) for name in coefficient_names(law)])
