"""Cross-entropy mixed with distillation: the plain reference, on given logits, and fused with the output head."""

from megatron_kd.losses.given_logits import kd_cross_entropy
from megatron_kd.losses.head import linear_kd_cross_entropy
from megatron_kd.losses.reference import reference_kd_cross_entropy
from megatron_kd.losses.types import KDLoss

__all__ = ["KDLoss", "kd_cross_entropy", "linear_kd_cross_entropy", "reference_kd_cross_entropy"]
