"""Hold a teacher's distillation targets, and select sparse ones from its logits."""

from megatron_kd.targets.dense import DenseTarget, Target
from megatron_kd.targets.sample import SampleSelection
from megatron_kd.targets.select import Selection, TopSelection, linear_targets, select_targets
from megatron_kd.targets.sparse import SparseTarget

__all__ = [
    "DenseTarget",
    "SampleSelection",
    "Selection",
    "SparseTarget",
    "Target",
    "TopSelection",
    "linear_targets",
    "select_targets",
]
