"""Probe a model of this folder's language: copying, finding values, and sums with many tries.

    python examples/in_context/probe.py RUN DATA --json OUT

DATA is the folder that prepare.py wrote. Copying and finding: how often the most probable id is the
right one, with the right ids before every position. Sums: `--samples` continuations of each
held-out problem at each temperature. A continuation is right if every step is. The result has
pass@k for every k by the unbiased estimator (megatron_kd/inference/pass_at_k.py). A sample depends
on --seed and on the positions of problem, sample and id alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from language import END, IDS, MAX_TERMS, WORDS, right_solutions

from megatron_kd.config import ConfigError
from megatron_kd.inference.pass_at_k import mean_pass_at_k
from megatron_kd.storage.atomic_files import write_atomically

if TYPE_CHECKING:
    from megatron_kd.inference.frozen_model import FrozenModel

Ids = list[int]
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
SUMMARY_KS = (1, 16)  # k of the summary; the points have every k
MAX_NEW_TOKENS = 6 * (MAX_TERMS - 1) + 3  # steps, "answer", the number, <end>
FORWARD_BATCH = 64  # sequences of one forward pass

# Maps ids [B, S] to the most probable next ids [B, S].
PredictTop = Callable[[Tensor], Tensor]
# Maps prompts and a temperature to a continuation of each, without its end.
Sample = Callable[[Sequence[Ids], float], list[Ids]]


class ProbedModel:
    """Predict and sample with a model.

    Args:
        model: The model.
        batch_size: Continuations at one time.
        seed: Seed of the samples.
    """

    def __init__(self, model: FrozenModel, *, batch_size: int, seed: int) -> None:
        self.model, self.batch_size, self.seed = model, batch_size, seed

    def predict_top(self, tokens: Tensor) -> Tensor:
        """Return the most probable next ids, int64 [B, S], on the CPU, of ids [B, S]."""
        hidden = self.model.hidden(tokens.to(self.model.groups.platform.device))
        assert hidden is not None
        return self.model.logits(hidden).argmax(-1).T.cpu()

    def sample(self, prompts: Sequence[Ids], temperature: float) -> list[Ids]:
        """Return a continuation of each prompt, without its end."""
        from megatron_kd.inference.generate import Sampling, generate_ids

        sampling = Sampling(MAX_NEW_TOKENS, temperature=temperature, seed=self.seed)
        continuations = generate_ids(
            self.model, prompts, sampling, end_of_document=IDS[END], batch_size=self.batch_size
        )
        return [continuation.tokens for continuation in continuations]


def main() -> int:
    """Probe the model and return 0, or 2 after an error message."""
    arguments = _parser().parse_args()
    try:
        write_atomically(arguments.json, json.dumps(measure(arguments), indent=1).encode())
    except ConfigError as error:
        print(f"probe: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements of one model in one process.

    Raises:
        ConfigError: An argument, the probes or the checkpoint cannot be used.
    """
    if (
        arguments.samples < max(SUMMARY_KS)
        or arguments.batch_size < 1
        or (arguments.problems is not None and arguments.problems < 1)
    ):
        raise ConfigError(
            f"--samples must be at least {max(SUMMARY_KS)}, --batch-size and --problems at least 1"
        )
    probes = read_probes(arguments.data / "probes.json")
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.parallel.platform import start_platform

    folder = find_checkpoint(arguments.run, setting="checkpoint")
    info = read_info(folder, setting="checkpoint")
    if info.vocab_size != len(WORDS):
        raise ConfigError(
            f"the model has {info.vocab_size} ids and the language {len(WORDS)}: it was not "
            "trained on prepare.py's data"
        )
    platform = start_platform(arguments.device)
    # The platform must be prepared before megatron-core is imported.
    from megatron_kd.config import ParallelSection
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.parallel.groups import start_groups, stop_groups

    layout = ParallelSection()
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        frozen = FrozenModel(
            folder, info, groups, layout, precision=info.precision, sequence_length=1
        )
        model = ProbedModel(frozen, batch_size=arguments.batch_size, seed=arguments.seed)
        problems = probes["sum"][: arguments.problems]
        scores = {
            "copy": score_copies(probes["copy"], model.predict_top),
            "needle": score_needles(probes["needle"], model.predict_top),
            "sum": score_sums(problems, model.sample, arguments.samples),
        }
    finally:
        stop_groups()
    return {
        "checkpoint": str(folder),
        "step": info.step,
        "samples": arguments.samples,
        "seed": arguments.seed,
        **scores,
    }


def read_probes(path: Path) -> dict[str, Any]:
    """Return the probes that prepare.py wrote.

    Raises:
        ConfigError: The file is absent or damaged, or of another version of the language.
    """
    try:
        probes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): write it with prepare.py") from error
    if probes.get("words") != list(WORDS):
        raise ConfigError(f"{path} is of another version of language.py: run prepare.py again")
    return probes


def top_ids(documents: Sequence[Ids], predict_top: PredictTop) -> list[Ids]:
    """Return the most probable id after each id of each document."""
    predictions: list[Ids] = []
    for start in range(0, len(documents), FORWARD_BATCH):
        batch = documents[start : start + FORWARD_BATCH]
        longest = max(map(len, batch))
        # Padding after a document's end changes nothing before it.
        padded = [document + [0] * (longest - len(document)) for document in batch]
        predicted = predict_top(torch.tensor(padded))
        predictions += [
            ids[: len(document)].tolist() for ids, document in zip(predicted, batch, strict=True)
        ]
    return predictions


def score_copies(probes: Sequence[dict[str, Any]], predict_top: PredictTop) -> dict[str, Any]:
    """Return the share of repeated ids that were predicted, in all and by distance.

    The distance is the number of ids from the first occurrence to the second.
    """
    predictions = top_ids([probe["tokens"] for probe in probes], predict_top)
    scores: list[tuple[int, float]] = []
    for probe, predicted in zip(probes, predictions, strict=True):
        tokens = probe["tokens"]
        scores += [
            (probe["distance"], float(predicted[position - 1] == tokens[position]))
            for position in range(probe["start"], len(tokens))
        ]
    return {
        "accuracy": mean(score for _, score in scores),
        "by_distance": group_scores("distance", scores),
    }


def score_needles(probes: Sequence[dict[str, Any]], predict_top: PredictTop) -> dict[str, Any]:
    """Return the share of questions with the right value, in all, by depth and by context."""
    predictions = top_ids([probe["prompt"] for probe in probes], predict_top)
    scores = [
        float(predicted[-1] == probe["value"])
        for probe, predicted in zip(probes, predictions, strict=True)
    ]
    result: dict[str, Any] = {"accuracy": mean(scores)}
    for key in ("depth", "context"):
        settings = [probe[key] for probe in probes]
        result[f"by_{key}"] = group_scores(key, list(zip(settings, scores, strict=True)))
    return result


def score_sums(probes: Sequence[dict[str, Any]], sample: Sample, samples: int) -> dict[str, Any]:
    """Return pass@k at each temperature, and the best over temperatures.

    A point has "pass", a list from k = 1 on, and pass@1 and pass@16 of it. "solutions" is the
    number of different right continuations of a problem among its samples, mean over problems.

    Args:
        probes: Problems with "prompt" and "terms".
        sample: Function that continues prompts at a temperature.
        samples: Continuations of each problem.
    """
    prompts = [probe["prompt"] for probe in probes for _ in range(samples)]
    solutions = [right_solutions(probe["terms"]) for probe in probes]
    points: list[dict[str, Any]] = []
    for temperature in TEMPERATURES:
        continuations = sample(prompts, temperature)
        right = [
            right_continuations(
                continuations[index * samples : (index + 1) * samples], solutions[index]
            )
            for index in range(len(probes))
        ]
        counts = [len(words) for words in right]
        pass_at_k = [mean_pass_at_k(samples, counts, k) for k in range(1, samples + 1)]
        points.append(
            {
                "temperature": temperature,
                **{f"pass_{k}": pass_at_k[k - 1] for k in SUMMARY_KS},
                "solutions": mean(float(len(set(words))) for words in right),
                "pass": pass_at_k,
            }
        )
    best = {f"best_pass_{k}": max(point[f"pass_{k}"] for point in points) for k in SUMMARY_KS}
    return {"problems": len(probes), **best, "points": points}


def right_continuations(
    continuations: Sequence[Ids], solutions: set[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Return the words of the continuations that are a right solution."""
    texts = [tuple(WORDS[id_] for id_ in ids) for ids in continuations]
    return [words for words in texts if words in solutions]


def group_scores(name: str, scores: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """Return the accuracy and the number of probes for each setting.

    Args:
        name: Key of the setting in the result.
        scores: (setting, score) of each probe.
    """
    groups: dict[float, list[float]] = {}
    for setting, score in sorted(scores):
        groups.setdefault(setting, []).append(score)
    return [
        {name: setting, "accuracy": mean(group), "count": len(group)}
        for setting, group in groups.items()
    ]


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="run directory, its checkpoints folder, or one step-* folder"
    )
    parser.add_argument("data", type=Path, help="folder of prepare.py")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--samples", type=int, default=32, help="continuations of each problem and temperature (32)"
    )
    parser.add_argument("--problems", type=int, help="largest number of sums (all)")
    parser.add_argument(
        "--batch-size", type=int, default=512, help="continuations at one time (512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (0)")
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto takes CUDA where there is one",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
