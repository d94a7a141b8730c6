"""Sparse distillation targets and how they are chosen from a teacher's logits."""

from megatron_kd.targets.select import TopSelection, linear_targets, select_targets
from megatron_kd.targets.sparse import SparseTarget

__all__ = ["SparseTarget", "TopSelection", "linear_targets", "select_targets"]
