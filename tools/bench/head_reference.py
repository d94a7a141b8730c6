"""Make random inputs of an output head, and compute the gradients of its losses in fp64."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kd.targets import SparseTarget

from .head_variants import TOP_K_LOSS, HeadInputs, HeadVariant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Gradients are compared on at most so many tokens and rows of the weight. All tokens contribute to
# the latter.
CHECKED_TOKENS, CHECKED_ROWS = 256, 2048
LOGIT_SPREAD = 4.8  # standard deviation of the logits
CHUNK = 1 << 23  # logits of one chunk in fp64


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1)


def _jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_kl(log_q, log_m) + _kl(log_p, log_m))


# Distance [C] of the student's logits z [C, V] from the teacher's t [C, V], or from its kept ids
# and their log-probabilities, both [C, K].
_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "KL(top-k || p)": lambda z, t, ids, kept: _kl(kept, z.log_softmax(1).gather(1, ids)),
    "KL within top-k": lambda z, t, ids, kept: _kl(kept, z.gather(1, ids).log_softmax(1)),
    "KL": lambda z, t, ids, kept: _kl(t.log_softmax(1), z.log_softmax(1)),
    "JSD": lambda z, t, ids, kept: _jensen_shannon(t.log_softmax(1), z.log_softmax(1)),
    "cosine": lambda z, t, ids, kept: 1.0 - F.cosine_similarity(z, t),
}


@dataclass(frozen=True)
class TeacherChunk:
    """Hold what a loss may need besides the student's logits, for C tokens.

    Attributes:
        logits: The teacher's logits, [C, V].
        labels: [C], int64.
        target: The teacher's kept entries, [C, K].
    """

    logits: Tensor
    labels: Tensor
    target: SparseTarget


def token_loss(name: str, logits: Tensor, teacher: TeacherChunk, alpha: float) -> Tensor:
    """Compute a loss plainly. Kept entries are rescaled to sum to 1.

    Args:
        name: What a variant `computes`.
        logits: The student's logits, [C, V].
        teacher: Labels and the teacher's distribution of the same tokens.
        alpha: Weight of the distance where there is a cross-entropy too.

    Returns:
        The loss of each token, [C], in nats.
    """
    cross_entropy = None
    if name.startswith("CE"):
        cross_entropy = F.cross_entropy(logits, teacher.labels, reduction="none")
        if name == "CE":
            return cross_entropy
    kept = teacher.target.logprobs.to(logits.dtype).log_softmax(1)
    distance = _DISTANCES[name.removeprefix("CE + ")](
        logits, teacher.logits, teacher.target.indices.long(), kept
    )
    return distance if cross_entropy is None else (1.0 - alpha) * cross_entropy + alpha * distance


def make_inputs(arguments: argparse.Namespace) -> HeadInputs:
    """Make random inputs of a student that is near its teacher.

    Both share as many columns of hidden states and weight as the narrower one has. The other
    columns are noise, whose size --near sets.
    """
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    generator = torch.Generator(device).manual_seed(arguments.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens, vocab = arguments.tokens, arguments.vocab
    width = min(arguments.hidden, arguments.teacher_hidden)
    states, weight = normal(tokens, width), normal(vocab, width) * (LOGIT_SPREAD / width**0.5)

    def widened(total: int, noise: float) -> tuple[Tensor, Tensor]:
        """Return states [N, total] and weight [V, total] whose logits have noise of this size."""
        extra = total - width
        padded = F.pad(weight, (0, extra)) + normal(vocab, total) * (noise / total**0.5)
        return torch.cat([states, normal(tokens, extra)], dim=1).to(dtype), padded.to(dtype)

    # The wider of the two has the noise that is between them.
    noise = (arguments.near, 0.0) if arguments.teacher_hidden > width else (0.0, arguments.near)
    teacher_hidden, teacher_weight = widened(arguments.teacher_hidden, noise[0])
    hidden, weight = widened(arguments.hidden, noise[1])
    ids, logprobs, labels = [], [], []
    exact_weight = teacher_weight.double()
    for chunk in teacher_hidden.split(max(1, CHUNK // vocab)):
        logits = chunk.double() @ exact_weight.t()
        top = logits.topk(arguments.top_k, dim=1)
        ids.append(top.indices.int())
        logprobs.append((top.values - logits.logsumexp(1, keepdim=True)).float())
        labels.append(torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1))
    target = SparseTarget(torch.cat(ids), torch.cat(logprobs))
    return HeadInputs(
        hidden, weight, torch.cat(labels), teacher_hidden, teacher_weight, target, arguments.alpha
    )


@dataclass
class ReferenceGradients:
    """Hold the gradients of losses in fp64, by autograd on full logits.

    Attributes:
        tokens: Checked tokens, [n].
        rows: Checked rows of the weight, [m].
        hidden: Gradients of the hidden states of `tokens`, [n, H], by loss.
        weight: Gradients of the `rows` of the weight, [m, H], by loss.
    """

    inputs: HeadInputs
    tokens: Tensor
    rows: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def compute(cls, inputs: HeadInputs, names: set[str]) -> ReferenceGradients:
        """Compute the gradients of some losses.

        Half of the rows are those that the teacher keeps most often; tokens and the other rows are
        random.

        Args:
            inputs: The inputs.
            names: Names of the losses.
        """
        count, vocab = inputs.tokens, inputs.weight.shape[0]
        device = inputs.hidden.device
        tokens = torch.randperm(count, device=device)[:CHECKED_TOKENS].sort().values
        counts = torch.bincount(inputs.target.indices.flatten().long(), minlength=vocab)
        by_count = (counts + torch.rand(vocab, device=device)).argsort(descending=True)
        random_rows = torch.randperm(vocab, device=device)
        half = CHECKED_ROWS // 2
        rows = torch.cat([by_count[:half], random_rows[:half]]).unique()
        reference = cls(inputs, tokens, rows)
        states, weight = inputs.hidden.double(), inputs.weight.double()
        for name in names:
            reference.hidden[name] = states.new_empty(len(tokens), states.shape[1])
            reference.weight[name] = states.new_zeros(len(rows), states.shape[1])
        teacher = inputs.teacher_weight.double() if names - {"CE", TOP_K_LOSS} else None
        for chunk in torch.arange(count, device=device).split(max(1, CHUNK // vocab)):
            reference._add(chunk, states[chunk], weight, teacher)
        return reference

    def _add(
        self, chunk: Tensor, states: Tensor, weight: Tensor, teacher_weight: Tensor | None
    ) -> None:
        """Add the gradients of a chunk of tokens.

        Args:
            chunk: Token numbers, [C].
            states: Hidden states of these tokens, [C, H], fp64.
            weight: [V, H], fp64.
            teacher_weight: [V, H_t], fp64. None if no loss needs the teacher's logits.
        """
        inputs = self.inputs
        logits = (states @ weight.t()).requires_grad_()
        if teacher_weight is None:
            teacher_logits = logits.detach()
        else:
            teacher_logits = inputs.teacher_hidden[chunk].double() @ teacher_weight.t()
        target = inputs.target.map(lambda tensor: tensor[chunk])
        teacher = TeacherChunk(teacher_logits, inputs.labels[chunk], target)
        checked = torch.isin(chunk, self.tokens)
        positions = torch.searchsorted(self.tokens, chunk[checked])
        share = len(chunk) / inputs.tokens
        for name in self.hidden:
            loss = token_loss(name, logits, teacher, inputs.alpha).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            self.hidden[name][positions] = gradient[checked] @ weight * share
            self.weight[name] += gradient[:, self.rows].t() @ states * share

    def errors(self, variant: HeadVariant, result: Any) -> dict[str, float]:
        """Return relative Frobenius errors of a variant's gradients, or of its targets."""
        if variant.computes == "product":
            return {}
        if variant.computes == "targets":
            return {"logprobs": _relative_error(result.logprobs, self.inputs.target.logprobs)}
        hidden, weight = result
        return {
            "hidden": _relative_error(hidden[self.tokens], self.hidden[variant.computes]),
            "weight": _relative_error(weight[self.rows], self.weight[variant.computes]),
        }


def _relative_error(value: Tensor, expected: Tensor) -> float:
    error = ((value.double() - expected.double()).norm() / expected.double().norm()).item()
    return math.inf if math.isnan(error) else error
