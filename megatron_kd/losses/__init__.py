"""Mix cross-entropy with distillation: plain reference, on given logits, or inside the head."""

from megatron_kd.losses.divergence import Divergence
from megatron_kd.losses.linear_loss import linear_divergence, linear_kd_cross_entropy
from megatron_kd.losses.logits_loss import kd_cross_entropy
from megatron_kd.losses.reference import reference_kd_cross_entropy
from megatron_kd.losses.spec import KDLoss
from megatron_kd.targets.dense import DenseTarget as DenseTeacher

__all__ = [
    "DenseTeacher",
    "Divergence",
    "KDLoss",
    "kd_cross_entropy",
    "linear_divergence",
    "linear_kd_cross_entropy",
    "reference_kd_cross_entropy",
]
