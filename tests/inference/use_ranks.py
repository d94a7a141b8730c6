"""Use a trained student on two ranks, in every layout. Spawned ranks import this module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_kd.config import RunConfig

PROMPTS = ("def main(", "import", "", "class Row:\n    ")
NEW_TOKENS = 24
VOCAB = 400
MEASURED = 12
WINDOW = 40
LAYOUTS: dict[str, dict[str, int]] = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


@dataclass
class StudentResults:
    """Hold results by layout ("one", "tp2", "pp2").

    Attributes:
        greedy: Greedy texts.
        sampled: Sampled texts.
        unbatched: Sampled texts, one prompt at a time, in the layout "one".
        ids: Ids of the sampled texts.
        ids_of_ids: Ids that prompts of ids give with the same seed.
        refusals: Error messages for prompts of ids that cannot be continued.
        uncached: Ids of greedy continuations without a key/value cache.
        tokens: Ids of the greedy texts in the layout "one".
        perplexity: (cross-entropy, tokens).
        measured: Everything measured beside the teacher, and with the suffix " near" beside a model
            that agrees with the student on about half of the tokens.
        bend: Strength of the change that makes that model.
        plain: The same from whole logits in fp64, with suffix "" or " near".
        scores: Document scores.
        plain_scores: Document scores from whole logits.
        validation: The run's own validation.
    """

    greedy: dict[str, list[str]] = field(default_factory=dict)
    sampled: dict[str, list[str]] = field(default_factory=dict)
    unbatched: list[str] = field(default_factory=list)
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    ids_of_ids: dict[str, list[list[int]]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    uncached: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    perplexity: dict[str, tuple[float, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    bend: float = 0.0
    plain: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    plain_scores: list[float] = field(default_factory=list)
    validation: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Models:
    """Hold the models of one layout: the student, its teacher, and a second copy of the student."""

    student: Any
    teacher: Any
    near: Any


def train_and_use(
    rendezvous: str, config: RunConfig, valid: str, tokenizer_path: str
) -> StudentResults:
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.config import ParallelSection
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.loop import train

    run = build_run(config, rendezvous=rendezvous)
    train(run)
    results = StudentResults(validation=evaluate(run)["held_out"])
    student_folder = find_checkpoint(config.run.directory, setting="test")
    teacher_folder = find_checkpoint(config.teacher.checkpoint, setting="test")
    platform = start_platform("cpu")
    for layout_name, sizes in LAYOUTS.items():
        layout = ParallelSection(**sizes)
        groups = start_groups(platform, layout, timeout_seconds=60)
        student, teacher, near = (
            FrozenModel(
                folder,
                read_info(folder, setting="test"),
                groups,
                layout,
                precision="fp32",
                sequence_length=config.batch.sequence_length,
            )
            for folder in (student_folder, teacher_folder, student_folder)
        )
        _generate(results, layout_name, student, tokenizer_path)
        _measure(results, layout_name, Models(student, teacher, near), valid, config)
    stop_groups()
    return results


def _generate(results: StudentResults, layout_name: str, model: Any, tokenizer_path: str) -> None:
    """Continue the prompts as texts and as ids."""
    from megatron_kd.data.tokenizer import load_tokenizer
    from megatron_kd.inference.generate import Sampling, generate, generate_ids

    tokenizer, info = load_tokenizer(tokenizer_path)
    sampling = Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5)
    end: dict[str, Any] = {"end_of_document": info.end_of_document}

    greedy = generate(model, tokenizer, PROMPTS, Sampling(NEW_TOKENS), **end, batch_size=3)
    results.greedy[layout_name] = [continuation.text for continuation in greedy]
    sampled = generate(model, tokenizer, PROMPTS, sampling, **end, batch_size=3)
    results.sampled[layout_name] = [continuation.text for continuation in sampled]
    results.ids[layout_name] = [continuation.tokens for continuation in sampled]
    prompts = [continuation.prompt for continuation in sampled]
    of_ids = generate_ids(model, prompts, sampling, **end, batch_size=2)
    results.ids_of_ids[layout_name] = [continuation.tokens for continuation in of_ids]
    assert not any(continuation.text for continuation in of_ids)
    if layout_name == "one":
        results.tokens = [continuation.tokens for continuation in greedy]
        results.refusals = [
            _refusal(model, ids, stop) for ids, stop in (([], ()), ([VOCAB], ()), ([1], ("x",)))
        ]
        results.uncached = [
            _uncached(model, continuation.prompt, info.end_of_document) for continuation in greedy
        ]
        unbatched = generate(model, tokenizer, PROMPTS, sampling, **end, batch_size=1)
        results.unbatched = [continuation.text for continuation in unbatched]


def _held_out(valid: str, config: RunConfig, batch_size: int) -> Any:
    from megatron_kd.inference.perplexity import HeldOutSet

    return HeldOutSet(
        valid,
        "held_out",
        config.batch.sequence_length,
        batch_size,
        config.run.directory / "measured",
        MEASURED,
    )


def _measure(
    results: StudentResults, layout_name: str, models: Models, valid: str, config: RunConfig
) -> None:
    """Measure losses, calibration and document scores in one layout."""
    from megatron_kd.inference.perplexity import measure

    student, teacher, near = models.student, models.teacher, models.near
    by_two, by_three = (_held_out(valid, config, batch_size) for batch_size in (2, 3))
    if layout_name == "one":
        results.bend = _bend_for_half_agreement(student, near, valid, config)
    if student.groups.is_last_stage:
        _bend(near, results.bend)
    perplexity = measure(student, by_three)
    results.perplexity[layout_name] = (perplexity.cross_entropy, perplexity.tokens)
    results.measured[layout_name] = measure(student, by_two, teacher).describe(valid)
    results.measured[f"{layout_name} near"] = measure(student, by_three, near).describe(valid)
    folder = config.run.directory / f"scores-{layout_name}"
    results.scores[layout_name] = _scores((student, teacher), valid, folder)
    if layout_name == "one":
        results.plain_scores = _plain_scores(student, teacher, valid)
        results.plain = {
            "": _plain(student, teacher, valid, config),
            " near": _plain(student, near, valid, config),
        }


def _bend(model: Any, strength: float) -> None:
    """Scale the channels of the final norm differently."""
    scale = model.chunk.decoder.final_layernorm.weight.data
    scale.mul_(1 + strength * torch.linspace(-2.0, 2.0, len(scale)))


def _bend_for_half_agreement(student: Any, near: Any, valid: str, config: RunConfig) -> float:
    """Find the strength at which about half of the first tokens keep their most probable id.

    It depends on the student's weights.
    """
    from megatron_kd.inference.perplexity import held_out_batches

    dataset = held_out_batches(student, _held_out(valid, config, 1)).dataset
    tokens = torch.stack([dataset[number]["tokens"] for number in range(4)])
    scale = near.chunk.decoder.final_layernorm.weight.data
    original_scale = scale.clone()
    top_ids = student.logits(student.hidden(tokens)).argmax(-1)
    agreement = {}
    for strength in torch.linspace(0.02, 1.0, 50).tolist():
        _bend(near, strength)
        bent_ids = near.logits(near.hidden(tokens)).argmax(-1)
        agreement[strength] = float((bent_ids == top_ids).double().mean())
        scale.copy_(original_scale)
    return min(agreement, key=lambda strength: abs(agreement[strength] - 0.5))


def _refusal(model: Any, ids: list[int], stop: tuple[str, ...]) -> str:
    from megatron_kd.config import ConfigError
    from megatron_kd.inference.generate import Sampling, generate_ids

    try:
        generate_ids(model, [[1], ids], Sampling(1, stop=stop), end_of_document=None, batch_size=2)
    except ConfigError as error:
        return str(error)
    return "not refused"


def _uncached(model: Any, prompt: list[int], end_of_document: int) -> list[int]:
    """Continue greedily, with the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        hidden = model.hidden(torch.tensor([ids]))
        next_id = int(model.logits(hidden)[-1, 0].argmax())
        if next_id == end_of_document:
            break
        ids.append(next_id)
    return ids[len(prompt) :]


def _logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [S, V] of one sequence, computed from whole logits in fp64."""
    return model.logits(model.hidden(tokens[None]))[:, 0].double().log_softmax(-1)


def _plain(student: Any, teacher: Any, valid: str, config: RunConfig) -> dict[str, float]:
    """Compute what `measure` reports from whole logits. This rank alone holds both models."""
    from megatron_kd.inference.perplexity import held_out_batches

    columns: list[list[torch.Tensor]] = []
    dataset = held_out_batches(student, _held_out(valid, config, 1)).dataset
    for number in range(MEASURED):
        sample = dataset[number]
        labels = sample["labels"][:, None]
        q, p = (_logprobs(model, sample["tokens"]) for model in (student, teacher))
        columns.append(
            [
                -q.gather(1, labels)[:, 0],
                (q.argmax(-1) == sample["labels"]).double(),
                (p.exp() * (p - q)).sum(-1),
                (q.argmax(-1) == p.argmax(-1)).double(),
                -p.gather(1, labels)[:, 0],
                q.amax(-1).exp(),
            ]
        )
    loss, correct, kl, agreement, teacher_loss, confidence = (
        torch.cat(column) for column in zip(*columns, strict=True)
    )
    means = {
        "cross_entropy": loss,
        "accuracy": correct,
        "teacher_kl": kl,
        "teacher_agreement": agreement,
        "teacher_cross_entropy": teacher_loss,
    }
    return {
        "calibration_error": _calibration_error(correct, confidence),
        **{name: float(values.mean()) for name, values in means.items()},
    }


def _calibration_error(correct: torch.Tensor, confidence: torch.Tensor) -> float:
    """Compute the expected calibration error in 15 bins of equal width."""
    error = 0.0
    for k in range(15):
        in_bin = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        error += abs(float((correct - confidence)[in_bin].sum())) / len(correct)
    return error


def _scores(models: Any, valid: str, folder: Path) -> np.ndarray:
    """Score all documents on all ranks together, in shards of few tokens."""
    from megatron_kd.data.token_files import read_index
    from megatron_kd.inference.document_scores import (
        ScoringJob,
        cut_shards,
        read_scores,
        score_shards,
    )

    index = read_index(valid)
    shards = cut_shards(index.lengths.astype(np.int64), 400)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    numbers = list(range(len(shards)))[models[0].groups.data_rank :: models[0].groups.data_size]
    job = ScoringJob(valid, index, shards, folder, WINDOW, batch_size=5)
    for _progress in score_shards(models, job, numbers):
        pass
    dist.barrier()
    return read_scores(folder, shards)


def _plain_scores(teacher: Any, reference: Any, valid: str) -> list[float]:
    """Score document by document and window by window, from whole logits in fp32."""
    from megatron_kd.data.token_files import read_index

    index = read_index(valid)
    tokens = torch.from_numpy(np.fromfile(f"{valid}.bin", dtype=index.dtype).astype(np.int64))
    scores = []
    for document in tokens.split(index.lengths.tolist()):
        ratios = []
        for begin in range(0, len(document) - 1, WINDOW):
            window = document[begin : begin + WINDOW + 1]
            p, r = (
                model.logits(model.hidden(window[None, :-1]))[:, 0].log_softmax(-1)
                for model in (teacher, reference)
            )
            ratios.append((p - r).gather(1, window[1:, None])[:, 0].double())
        scores.append(float(torch.cat(ratios).mean()) if ratios else math.nan)
    return scores
