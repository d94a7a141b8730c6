"""What a model of this folder's language can do: copy, find, and add with many tries.

    python examples/in_context/probe.py RUN DATA --json OUT

DATA: the folder of prepare.py. Copying and finding: how often the likeliest id is the right one, every position given the right ids before
it. Sums: `--samples` continuations of each held-out problem at each temperature, right where every step is; pass@k for every k by the
unbiased estimator (megatron_kd/inference/pass_at_k.py). A draw depends on --seed, and on the places of problem, sample and id alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from language import END, IDS, MOST_TERMS, WORDS, right_solutions

from megatron_kd.config import ConfigError
from megatron_kd.inference.pass_at_k import mean_pass_at_k
from megatron_kd.storage.atomic_files import write_atomically

Ids = list[int]
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
KS = (1, 16)  # of the summary; the points have every k
MAX_NEW_TOKENS = 6 * (MOST_TERMS - 1) + 3  # steps, "answer", the number, <end>
SEQUENCES = 64  # of one forward pass

Likeliest = Callable[[Tensor], Tensor]  # ids [B, S] -> the likeliest next ids [B, S]
Sample = Callable[
    [Sequence[Ids], float], list[Ids]
]  # prompts, temperature -> a continuation of each, without its end


def main() -> int:
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
    parser.add_argument("--problems", type=int, help="no more than this many sums (all)")
    parser.add_argument(
        "--batch-size", type=int, default=512, help="continuations at one time (512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto takes CUDA where there is one",
    )
    arguments = parser.parse_args()
    try:
        write_atomically(arguments.json, json.dumps(measure(arguments), indent=1).encode())
    except ConfigError as error:
        print(f"probe: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, of one model in one process. ConfigError for bad input."""
    if (
        arguments.samples < max(KS)
        or arguments.batch_size < 1
        or (arguments.problems is not None and arguments.problems < 1)
    ):
        raise ConfigError(
            f"--samples must be at least {max(KS)}, --batch-size and --problems at least 1"
        )
    probes = read_probes(arguments.data / "probes.json")
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.parallel.platform import start_platform

    folder = find_checkpoint(arguments.run, what="checkpoint")
    info = read_info(folder, what="checkpoint")
    if info.vocab_size != len(WORDS):
        raise ConfigError(
            f"the model has {info.vocab_size} ids and the language {len(WORDS)}: it was not trained on prepare.py's data"
        )
    platform = start_platform(arguments.device)
    from megatron_kd.config import ParallelSection
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.inference.generate import Sampling, generate_ids
    from megatron_kd.parallel.groups import start_groups, stop_groups

    layout = ParallelSection()
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        model = FrozenModel(
            folder, info, groups, layout, precision=info.precision, sequence_length=1
        )

        def likeliest(tokens: Tensor) -> Tensor:
            hidden = model.hidden(tokens.to(platform.device))
            assert hidden is not None
            return model.logits(hidden).argmax(-1).T.cpu()

        def sample(prompts: Sequence[Ids], temperature: float) -> list[Ids]:
            sampling = Sampling(MAX_NEW_TOKENS, temperature=temperature, seed=arguments.seed)
            found = generate_ids(
                model, prompts, sampling, end_of_document=IDS[END], batch_size=arguments.batch_size
            )
            return [each.tokens for each in found]

        found = {
            "copy": copying(probes["copy"], likeliest),
            "needle": finding(probes["needle"], likeliest),
            "sum": adding(probes["sum"][: arguments.problems], sample, arguments.samples),
        }
    finally:
        stop_groups()
    return {
        "checkpoint": str(folder),
        "step": info.step,
        "samples": arguments.samples,
        "seed": arguments.seed,
        **found,
    }


def read_probes(path: Path) -> dict[str, Any]:
    """What prepare.py wrote. ConfigError where it is absent, or of another version of the language."""
    try:
        probes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): write it with prepare.py") from error
    if probes.get("words") != list(WORDS):
        raise ConfigError(f"{path} is of another version of language.py: run prepare.py again")
    return probes


def next_ids(documents: Sequence[Ids], likeliest: Likeliest) -> list[Ids]:
    """The likeliest id after each id of each document; ids after a document's end, which fill up a batch, change nothing before it."""
    found: list[Ids] = []
    for start in range(0, len(documents), SEQUENCES):
        part = documents[start : start + SEQUENCES]
        longest = max(map(len, part))
        said = likeliest(torch.tensor([each + [0] * (longest - len(each)) for each in part]))
        found += [row[: len(each)].tolist() for row, each in zip(said, part, strict=True)]
    return found


def copying(probes: Sequence[dict[str, Any]], likeliest: Likeliest) -> dict[str, Any]:
    """Share of the ids that come again which were foreseen, by their distance from where they came first."""
    right: list[tuple[int, float]] = []
    for probe, said in zip(
        probes, next_ids([each["tokens"] for each in probes], likeliest), strict=True
    ):
        tokens, start = probe["tokens"], probe["start"]
        right += [
            (probe["distance"], float(said[place - 1] == tokens[place]))
            for place in range(start, len(tokens))
        ]
    return {"accuracy": mean(value for _, value in right), "by_distance": by("distance", right)}


def finding(probes: Sequence[dict[str, Any]], likeliest: Likeliest) -> dict[str, Any]:
    """Share of the questions that were answered with the right value, by depth and by length of the context."""
    said = next_ids([each["prompt"] for each in probes], likeliest)
    right = [
        float(answer[-1] == probe["value"]) for probe, answer in zip(probes, said, strict=True)
    ]
    return {
        "accuracy": mean(right),
        "by_depth": by(
            "depth", [(probe["depth"], value) for probe, value in zip(probes, right, strict=True)]
        ),
        "by_context": by(
            "context",
            [(probe["context"], value) for probe, value in zip(probes, right, strict=True)],
        ),
    }


def adding(probes: Sequence[dict[str, Any]], sample: Sample, samples: int) -> dict[str, Any]:
    """pass@k at each temperature, a list from k = 1 on; pass_1 and pass_16 of it; and the best over temperatures of each.

    solutions: different right continuations of a problem among its samples, mean over problems.
    """
    prompts = [probe["prompt"] for probe in probes for _ in range(samples)]
    accepted = [right_solutions(probe["terms"]) for probe in probes]
    points = []
    for temperature in TEMPERATURES:
        solved = sample(prompts, temperature)
        of_each = [solved[start : start + samples] for start in range(0, len(solved), samples)]
        right = [
            [words for ids in tries if (words := tuple(WORDS[id_] for id_ in ids)) in among]
            for among, tries in zip(accepted, of_each, strict=True)
        ]
        counts = [len(each) for each in right]
        passed = [mean_pass_at_k(samples, counts, k) for k in range(1, samples + 1)]
        summary = {f"pass_{k}": passed[k - 1] for k in KS}
        points.append(
            {
                "temperature": temperature,
                **summary,
                "solutions": mean(float(len(set(each))) for each in right),
                "pass": passed,
            }
        )
    best = {f"best_pass_{k}": max(point[f"pass_{k}"] for point in points) for k in KS}
    return {"problems": len(probes), **best, "points": points}


def by(name: str, right: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """Accuracy and number of probes for each value of what they differ in."""
    values = sorted({value for value, _ in right})
    groups = {value: [one for other, one in right if other == value] for value in values}
    return [
        {name: value, "accuracy": mean(group), "count": len(group)}
        for value, group in groups.items()
    ]


def mean(values: Iterable[float]) -> float:
    """Mean of at least one value."""
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
