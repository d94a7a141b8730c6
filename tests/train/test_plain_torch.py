"""Compare the engine with plain torch: forward, loss, gradient norm, clipping and AdamW.

Other tests compare layouts with each other. This one shows that their common result is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import RunConfig
from megatron_kd.losses import reference_kd_cross_entropy
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import run_all
from tests.train.plain import check_weights, double_target, plain_adamw, plain_logits, update
from tests.train.plain_run import engine_steps

STEPS = 4


def loss_sum(
    engine: dict[str, Any], step: int, weights: dict[str, torch.Tensor], config: RunConfig
) -> tuple[torch.Tensor, float]:
    """Return the loss of a step summed over its trained tokens, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for (tokens, labels, mask), target in zip(
        engine["batches"][step], engine["targets"][step], strict=True
    ):
        loss = reference_kd_cross_entropy(
            plain_logits(weights, config.model, tokens),
            labels,
            double_target(target),
            alpha=0.6,
            tail="bucket",
            z_loss=1e-3,
        )
        total = total + (loss.total * mask).sum()
        count += float(mask.sum())
    return total, count


@pytest.mark.dist
def test_engine_equals_plain_torch(tmp_path: Path) -> None:
    data = write_tokens(tmp_path)
    teacher = tiny(tmp_path / "teacher", data, train={"steps": 10})
    run_ranks(run_all, 1, [(teacher, 10, True)])
    config = tiny(
        tmp_path / "student",
        data,
        teacher={"source": "online", "checkpoint": str(tmp_path / "teacher")},
        distill={"alpha": 0.6, "top_k": 5, "tail": "bucket", "z_loss": 1e-3, "chunk_tokens": 13},
        # With a small eps, the sign of a gradient that is only rounding error would move its
        # weight by a whole learning rate.
        optimizer={"clip_grad": 0.2, "weight_decay": 0.1, "eps": 1e-4},
    )
    engine = run_ranks(engine_steps, 1, config, STEPS)[0]

    weights = {name: value.double().requires_grad_() for name, value in engine["before"].items()}
    adam = plain_adamw(weights, weight_decay=0.1, lr=1.0, eps=1e-4)
    for step in range(STEPS):
        adam.zero_grad()
        total, count = loss_sum(engine, step, weights, config)
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.2))
        record = engine["records"][step]
        assert record["total_loss"] == pytest.approx(float(total.detach()) / count, rel=2e-6)
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-5)
        assert norm > 0.2, "the test must exercise clipping"
        update(adam, engine["learning_rates"][step])
    check_weights(engine["before"], engine["after"], weights, config.model.vocab_size)


def test_padding_rows_never_move(tmp_path: Path) -> None:
    data = write_tokens(tmp_path)
    config = tiny(tmp_path / "run", data, model={"vocab_size_multiple": 64})
    trained = run_ranks(run_all, 1, [(config, 3, False)])[0][0]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert trained.weights[name].shape[0] == 128
        assert not trained.weights[name][101:].any()
        assert trained.weights[name][:101].abs().sum() > 0
