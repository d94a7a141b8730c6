"""List calls that must be refused, with a part of the message.

The same list serves one rank and many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_kd.losses import kd_cross_entropy, linear_kd_cross_entropy, reference_kd_cross_entropy
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import vocab_shard
from megatron_kd.targets import SparseTarget, TopSelection, linear_targets, select_targets

S, B, H, K, ROWS = 8, 2, 4, 3, 10


class Mistake(NamedTuple):
    name: str
    call: Callable[[], object]
    message: str


def good_target() -> SparseTarget:
    """Return a target of ids 0, 1, 2 for every token, mass 0.6, at temperature 1."""
    ids = torch.arange(K, dtype=torch.int32).expand(S, B, K).contiguous()
    return SparseTarget(
        ids, torch.full((S, B, K), 0.2).log(), torch.full((S, B), 0.4).log(), torch.ones(S, B)
    )


def _changed(tensor: Tensor, *places: tuple[int, float]) -> Tensor:
    """Return a copy with other values for the last token."""
    tensor = tensor.clone()
    for slot, value in places:
        tensor[-1, -1, slot] = value
    return tensor


def _wrong_targets(vocab_size: int) -> list[tuple[SparseTarget, dict[str, Any], str]]:
    """Return (target, scalars, message)."""
    return [*_wrong_tensors(), *_wrong_values(vocab_size), *_wrong_temperatures()]


def _wrong_tensors() -> list[tuple[SparseTarget, dict[str, Any], str]]:
    """Return targets with tensors of another shape or type."""
    good = good_target()
    return [
        (replace(good, indices=good.indices[:-1]), {}, "must both be (8, 2, 'K')"),
        (replace(good, logprobs=good.logprobs[..., :2]), {}, "must both be (8, 2, 'K')"),
        (
            replace(good, log_tail=good.logprobs),
            {},
            "target.log_tail must have the labels' shape (8, 2), not (8, 2, 3)",
        ),
        (
            replace(good, entropy=torch.ones(8)),
            {},
            "target.entropy must have the labels' shape (8, 2), not (8,)",
        ),
        (
            replace(good, indices=good.indices.float()),
            {},
            "target.indices must be int32 and target.logprobs fp32, not torch.float32",
        ),
        (
            replace(good, logprobs=good.indices),
            {},
            "target.indices must be int32 and target.logprobs fp32",
        ),
    ]


def _wrong_values(vocab_size: int) -> list[tuple[SparseTarget, dict[str, Any], str]]:
    """Return targets with ids or log-probabilities that no selection gives."""
    good = good_target()
    return [
        (
            replace(good, indices=_changed(good.indices, (1, vocab_size))),
            {},
            f"holds ids 0..{vocab_size}: valid are 0..{vocab_size - 1}",
        ),
        (
            replace(good, indices=_changed(good.indices, (1, -2))),
            {},
            "target.indices holds ids -2..2",
        ),
        (
            replace(good, indices=_changed(good.indices, (1, 2))),
            {},
            "target.indices names an id twice for one token",
        ),
        (
            replace(good, indices=_changed(good.indices, (0, -1), (1, -1), (2, -1))),
            {},
            "a token of target has no kept entry",
        ),
        (
            replace(good, logprobs=_changed(good.logprobs, *((k, -torch.inf) for k in range(K)))),
            {},
            "a token of target has no kept entry",
        ),
    ]


def _wrong_temperatures() -> list[tuple[SparseTarget, dict[str, Any], str]]:
    """Return targets whose temperature does not fit the loss."""
    good = good_target()
    sampled = replace(good, sampled=True, temperature=2.0)
    return [
        (
            good,
            {"temperature": 2.0, "tail": "bucket"},
            "knows its tail, which tail='bucket' needs, at temperature 1.0, not at 2.0",
        ),
        (good, {"temperature": 2.0, "tail": "uniform"}, "make it at the loss temperature"),
        (good, {"temperature": 2.0, "tail": "drop"}, "make it at the loss temperature"),
        (sampled, {"tail": "renormalize"}, "the target was sampled at temperature 2.0, not at 1.0"),
        (
            replace(good, log_tail=None, temperature=2.0),
            {"temperature": 2.0, "tail": "drop"},
            "needs target.log_tail",
        ),
    ]


def _wrong_arguments(vocab_size: int) -> list[tuple[dict[str, Any], str]]:
    """Return (changed arguments, message) that every loss refuses."""
    labels = torch.zeros((S, B), dtype=torch.long)
    past, negative = labels.clone(), labels.clone()
    past[3, 1], negative[0, 0] = vocab_size, -1
    return [
        ({"alpha": -0.1}, "alpha must be in [0, 1], not -0.1"),
        ({"alpha": 1.1}, "alpha must be in [0, 1], not 1.1"),
        ({"alpha": float("nan")}, "alpha must be in [0, 1], not nan"),
        ({"temperature": 0.0}, "temperature must be > 0, not 0.0"),
        ({"temperature": float("inf")}, "temperature must be > 0, not inf"),
        ({"tail": "rest"}, "tail must be one of drop, renormalize, bucket, uniform, not 'rest'"),
        ({"z_loss": -1.0}, "z_loss must be >= 0, not -1.0"),
        ({"labels": labels.float()}, "labels must be integers, not torch.float32"),
        ({"labels": labels.bool()}, "labels must be integers, not torch.bool"),
        (
            {"labels": past},
            f"label {vocab_size} is not in the vocabulary (0..{vocab_size - 1}) nor -100",
        ),
        ({"labels": negative}, "label -1 is not in the vocabulary"),
        ({"target": None}, "alpha = 0.5 needs a target"),
        *(
            ({"target": target, **scalars}, message)
            for target, scalars, message in _wrong_targets(vocab_size)
        ),
    ]


def _wrong_head_arguments(size: int) -> list[tuple[dict[str, Any], str]]:
    """Return (changed arguments, message) that only the loss of hidden states refuses."""
    return [
        (
            {"schedule": "eager"},
            "schedule must be one of auto, save, chunk, direct, recompute, not 'eager'",
        ),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
        ({"weight": torch.randn(ROWS, H + 1)}, "must end in the same width and have the same type"),
        ({"weight": torch.randn(ROWS)}, "must end in the same width and have the same type"),
        (
            {"weight": torch.randn(ROWS, H).double()},
            "torch.float64 must end in the same width and have the same type",
        ),
        (
            {"labels": torch.zeros((S - 1, B), dtype=torch.long)},
            "labels (7, 2) must be (8, 2): the full sequence of hidden",
        ),
        ({"loss_mask": torch.ones(S)}, "loss_mask (8,) must have the labels' shape (8, 2)"),
        (
            {"vocab_size": 0},
            f"vocab_size (0) must be in [1, {ROWS * size}]: {size} rank(s) hold {ROWS} vocabulary "
            "rows each",
        ),
        (
            {"vocab_size": ROWS * size + 1},
            f"vocab_size ({ROWS * size + 1}) must be in [1, {ROWS * size}]",
        ),
    ]


def _mistakes_of(
    loss: Callable[..., object], cases: list[tuple[dict[str, Any], str]]
) -> list[Mistake]:
    """Return the calls of a loss with changed arguments."""
    return [
        Mistake(f"{loss.__name__} {message}", partial(loss, **changes), message)
        for changes, message in cases
    ]


def _good_arguments() -> dict[str, Any]:
    """Return arguments that every loss accepts."""
    return {
        "labels": torch.zeros((S, B), dtype=torch.long),
        "target": good_target(),
        "alpha": 0.5,
    }


def loss_mistakes(group: Group, *, sequence_parallel: bool) -> list[Mistake]:
    """Return mistakes in calls of the three losses.

    The last rank has padding, and under `group` the vocabulary is split.
    """
    size = group_size(group)
    vocab_size = ROWS * size - 1
    lines = S // size if sequence_parallel else S
    good = _good_arguments()
    hidden, weight = (
        torch.randn(lines, B, H).requires_grad_(),
        torch.randn(ROWS, H).requires_grad_(),
    )
    layout: dict[str, Any] = {"tp_group": group, "vocab_size": vocab_size}

    def head(**changes: Any) -> object:
        arguments = {
            "hidden": hidden,
            "weight": weight,
            **good,
            **layout,
            "sequence_parallel": sequence_parallel,
            **changes,
        }
        return linear_kd_cross_entropy(**arguments)

    def logits_loss(**changes: Any) -> object:
        return kd_cross_entropy(**{"logits": torch.randn(S, B, ROWS), **good, **layout, **changes})

    def reference(**changes: Any) -> object:
        return reference_kd_cross_entropy(
            **{"logits": torch.randn(S, B, vocab_size), **good, **changes}
        )

    mistakes = [
        mistake
        for loss in (head, logits_loss, reference)
        for mistake in _mistakes_of(loss, _wrong_arguments(vocab_size))
    ]
    mistakes += _mistakes_of(head, _wrong_head_arguments(size))
    return [
        *mistakes,
        Mistake(
            "given vocab_size",
            lambda: logits_loss(vocab_size=ROWS * size + 1),
            f"vocab_size ({ROWS * size + 1}) must be in",
        ),
        Mistake(
            "given labels",
            lambda: logits_loss(labels=torch.zeros(S, dtype=torch.long)),
            "labels (8,) must have the logits' leading shape",
        ),
    ]


def _wrong_selections() -> list[Mistake]:
    """Return selections of top ids that cannot be made."""
    return [
        Mistake(
            "top_k 0", lambda: TopSelection(0), "need 1 <= min_k <= top_k, not min_k=1, top_k=0"
        ),
        Mistake(
            "min_k 0",
            lambda: TopSelection(4, min_k=0),
            "need 1 <= min_k <= top_k, not min_k=0, top_k=4",
        ),
        Mistake(
            "min_k past top_k",
            lambda: TopSelection(4, min_k=5),
            "need 1 <= min_k <= top_k, not min_k=5, top_k=4",
        ),
        Mistake("top_p 0", lambda: TopSelection(4, top_p=0.0), "top_p must be in (0, 1], not 0.0"),
        Mistake(
            "top_p 1.5", lambda: TopSelection(4, top_p=1.5), "top_p must be in (0, 1], not 1.5"
        ),
        Mistake(
            "temperature 0",
            lambda: TopSelection(4, temperature=0.0),
            "temperature must be > 0, not 0.0",
        ),
    ]


def selection_mistakes(group: Group, *, sequence_parallel: bool) -> list[Mistake]:
    """Return mistakes in selecting targets."""
    size = group_size(group)
    vocab_size = ROWS * size - 1
    hidden, weight, logits = torch.randn(S, B, H), torch.randn(ROWS, H), torch.randn(S, B, ROWS)
    shard = vocab_shard(ROWS, rank=group_rank(group), size=size, vocab_size=vocab_size)
    assert shard.valid in (ROWS, ROWS - 1)

    def select(top_k: int = K, vocab_size: int = vocab_size) -> object:
        return select_targets(logits, TopSelection(top_k), vocab_size=vocab_size, tp_group=group)

    def linear(
        weight: Tensor = weight,
        top_k: int = K,
        vocab_size: int = vocab_size,
        chunk_tokens: int | None = None,
    ) -> object:
        return linear_targets(
            hidden,
            weight,
            TopSelection(top_k),
            vocab_size=vocab_size,
            tp_group=group,
            sequence_parallel=sequence_parallel,
            chunk_tokens=chunk_tokens,
        )

    past = f"top_k ({vocab_size + 1}) is past the vocabulary ({vocab_size} ids)"
    rows = f"vocab_size ({ROWS * size + 1}) must be in [1, {ROWS * size}]"
    return [
        *_wrong_selections(),
        Mistake("select top_k", lambda: select(top_k=vocab_size + 1), past),
        Mistake("linear top_k", lambda: linear(top_k=vocab_size + 1), past),
        Mistake("select vocab_size", lambda: select(vocab_size=ROWS * size + 1), rows),
        Mistake("linear vocab_size", lambda: linear(vocab_size=ROWS * size + 1), rows),
        Mistake(
            "linear width",
            lambda: linear(weight=torch.randn(ROWS, H + 1)),
            "must end in the same width",
        ),
        Mistake(
            "linear one-dimensional",
            lambda: linear(weight=torch.randn(ROWS)),
            "must end in the same width",
        ),
        Mistake(
            "linear chunk_tokens",
            lambda: linear(chunk_tokens=0),
            "chunk_tokens must be at least 1, not 0",
        ),
    ]


def problem_with(mistake: Mistake) -> str | None:
    """Return None if the call is refused with the right message."""
    try:
        mistake.call()
    except ValueError as error:
        return None if mistake.message in str(error) else f"{mistake.name}: says {error}"
    except Exception as error:
        return f"{mistake.name}: {error!r}"
    return f"{mistake.name}: not refused"
