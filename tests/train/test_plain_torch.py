"""The engine against plain torch: forward, loss, gradient norm, clipping, AdamW. Layouts agree with each other elsewhere; this
says that what they agree on is right.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_kd.losses import reference_kd_cross_entropy
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import run_all
from tests.train.plain import plain_adamw, plain_logits
from tests.train.plain_run import engine_steps

STEPS = 4


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
        # A large eps, or the sign of a gradient that is rounding alone would move its weight by a whole learning rate.
        optimizer={"clip_grad": 0.2, "weight_decay": 0.1, "eps": 1e-4},
    )
    engine = run_ranks(engine_steps, 1, config, STEPS)[0]

    weights = {name: value.double().requires_grad_() for name, value in engine["before"].items()}
    adam = plain_adamw(weights, weight_decay=0.1, lr=1.0, eps=1e-4)
    for step in range(STEPS):
        adam.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        count = 0.0
        for (tokens, labels, mask), target in zip(
            engine["batches"][step], engine["targets"][step], strict=True
        ):
            wide = target.map(
                lambda t: t.transpose(0, 1).double() if t.is_floating_point() else t.transpose(0, 1)
            )
            logits = plain_logits(weights, config.model, tokens)
            loss = reference_kd_cross_entropy(
                logits, labels, wide, alpha=0.6, tail="bucket", z_loss=1e-3
            )
            total = total + (loss.total * mask).sum()
            count += float(mask.sum())
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.2))
        assert engine["rows"][step]["total_loss"] == pytest.approx(
            float(total.detach()) / count, rel=2e-6
        )
        assert engine["rows"][step]["grad_norm"] == pytest.approx(norm, rel=2e-5)
        assert norm > 0.2, "the test must see clipping at work"
        for group in adam.param_groups:
            group["lr"] = engine["learning_rates"][step]
        adam.step()
    for name, value in weights.items():
        rows = (
            slice(0, config.model.vocab_size)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight")
            else slice(None)
        )
        worst = float((engine["after"][name][rows] - value.detach()[rows]).abs().max())
        moved = float((engine["after"][name][rows] - engine["before"][name][rows]).abs().max())
        assert worst <= 2e-3 * moved, (name, worst, moved)


def test_padding_rows_never_move(tmp_path: Path) -> None:
    data = write_tokens(tmp_path)
    config = tiny(tmp_path / "run", data, model={"vocab_size_multiple": 64})
    trained = run_ranks(run_all, 1, [(config, 3, False)])[0][0]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert trained.weights[name].shape[0] == 128
        assert not trained.weights[name][101:].any()
        assert trained.weights[name][:101].abs().sum() > 0
