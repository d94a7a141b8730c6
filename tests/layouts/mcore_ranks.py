"""Run the head without a teacher and megatron-core's own cross-entropy, on two ranks."""

from __future__ import annotations

import os
from unittest.mock import patch

import torch.distributed as dist

from megatron_kd.losses import linear_kd_cross_entropy
from tests.losses.cases import make_problem, relative_error


def compare(rendezvous: str, seed: int) -> dict[str, float]:
    """Return relative errors of loss, hidden and weight gradient between the two, in fp32."""
    from megatron.core.tensor_parallel import cross_entropy

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    problem = make_problem(seed, vocab_size=92, rows=92)
    labels = problem.labels.clamp(min=0).view(20, 2)
    head_leaves, mcore_leaves = (
        [
            t.detach().float().clone().requires_grad_()
            for t in (problem.hidden.view(20, 2, -1), problem.weight.chunk(size)[rank])
        ]
        for _ in "12"
    )
    total = linear_kd_cross_entropy(
        *head_leaves, labels, None, alpha=0.0, tp_group=dist.group.WORLD
    ).total
    total.sum().backward()
    module = "megatron.core.tensor_parallel.cross_entropy.get_tensor_model_parallel_"
    with (
        patch(f"{module}group", return_value=dist.group.WORLD),
        patch(f"{module}rank", return_value=rank),
        patch(f"{module}world_size", return_value=size),
    ):
        expected = cross_entropy.vocab_parallel_cross_entropy(
            mcore_leaves[0] @ mcore_leaves[1].T, labels
        )
        expected.sum().backward()
    # megatron-core's linear layer would sum the gradient of hidden over the ranks.
    dist.all_reduce(mcore_leaves[0].grad)
    errors = {"loss": relative_error(total.detach(), expected.detach())}
    for name, a, b in zip(("hidden", "weight"), head_leaves, mcore_leaves, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        errors[name] = relative_error(a.grad, b.grad)
    dist.destroy_process_group()
    return errors
