"""Estimate the memory of the chunked output head, see head/chunked_head.py and head/sizes.py."""

from __future__ import annotations

from megatron_kd.head.sizes import (
    BLOCK,
    SAVED_LOGITS_CPU,
    SAVED_LOGITS_CUDA,
    TILE,
    buffer_width,
    chunk_size,
)
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.shape import RankShape


def chunk_tokens(run: PlannedRun, shape: RankShape) -> int:
    """Return the tokens whose logits exist at one time."""
    columns = -(-run.vocab_size // shape.tensor)
    return chunk_size(
        run.config.distill.chunk_tokens, columns, shape.tokens, on_cuda=run.device == "cuda"
    )


def student_head_bytes(run: PlannedRun) -> tuple[float, float]:
    """Return the bytes of the student's head in its forward and in its backward pass.

    Activations that the layers keep are not included.
    """
    shape, distill, cpu = run.student_shape, run.config.distill, run.device == "cpu"
    tokens, rows = shape.tokens, shape.vocabulary_rows
    width = buffer_width(min(rows, run.vocab_size))
    chunk = chunk_tokens(run, shape)
    weight_gradient = 4.0 * rows * shape.hidden
    dummy = float(shape.element_bytes * rows * shape.hidden)
    hidden_gradient = 4.0 * tokens * shape.hidden / shape.sequence_split
    hidden_gradient += 4.0 * chunk * shape.hidden
    # A token's loss holds ids, log-probabilities, probabilities and statistics of each entry.
    token_loss = 64.0 * tokens
    if run.config.teacher.enabled:
        token_loss = tokens * (40.0 * run.target_entries + 64.0)
    blocks = _scratch_bytes(chunk, width) if cpu else 0.0
    widened = _widened_weight(shape, rows) if cpu else 0.0
    buffers = 4.0 * chunk * width * (3 if distill.dense else 1) + blocks + widened + token_loss
    strategy = _memory_strategy(run)
    if strategy == "save":
        saved = 4.0 * tokens * width
        forward = buffers + saved - 4.0 * chunk * width
        return forward, max(saved + blocks + widened, dummy) + hidden_gradient + token_loss
    if strategy == "direct":
        return buffers + hidden_gradient, dummy + hidden_gradient
    if strategy == "recompute":
        return buffers, buffers + 8.0 * tokens * shape.hidden + dummy
    forward = buffers + hidden_gradient + weight_gradient
    return forward, weight_gradient + dummy + hidden_gradient + token_loss


def teacher_head_bytes(run: PlannedRun, shape: RankShape) -> float:
    """Return the bytes of one chunk of the teacher's logits and of selecting targets from it."""
    width = buffer_width(min(shape.vocabulary_rows, run.vocab_size))
    chunk = chunk_tokens(run, shape)
    scratch = widened = 0.0
    if run.device == "cpu":
        selected_columns = min(run.target_entries * TILE, width)
        scratch = _scratch_bytes(chunk, width) + 5.0 * chunk * selected_columns
        widened = _widened_weight(shape, shape.vocabulary_rows)
    hidden = 2 * shape.element_bytes * shape.tokens * shape.hidden
    return 4.0 * chunk * width + scratch + widened + hidden


def _memory_strategy(run: PlannedRun) -> str:
    """Return the head's memory strategy: head_schedule, with "auto" resolved where it saves."""
    shape, strategy = run.student_shape, run.config.distill.head_schedule
    limit = SAVED_LOGITS_CUDA if run.device == "cuda" else SAVED_LOGITS_CPU
    columns = -(-run.vocab_size // shape.tensor)
    if strategy == "auto" and shape.tokens * columns <= limit:
        return "save"
    return strategy


def _scratch_bytes(chunk: int, width: int) -> float:
    """Return the bytes of the blocks in which a CPU passes over a chunk."""
    return 8.0 * width * max(1, min(chunk, BLOCK // width))


def _widened_weight(shape: RankShape, rows: int) -> float:
    """Return the bytes of the fp32 copy of bf16 weights: a CPU multiplies fp32 by fp32."""
    return 4.0 * rows * shape.hidden if shape.element_bytes == 2 else 0.0
