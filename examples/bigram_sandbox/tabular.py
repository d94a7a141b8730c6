"""Measure the tabular learner of the sandbox: a table of next-id probabilities.

    python examples/bigram_sandbox/tabular.py --seed 1 --loss dpt90 --teacher imperfect --json OUT
    python examples/bigram_sandbox/tabular.py --seed 1 --complexity --json OUT

The table is learned from samples alone or from a teacher's distributions. The table that minimises
(1 - alpha) * cross-entropy + alpha * distillation is known. Every row with samples is the mixture
of the samples' shares and the teacher's distribution. Therefore nothing is trained, and only the
number of samples matters.

--complexity counts the samples until the total variation error of every row is at most `tolerance`,
for growing vocabularies of k ids. It fits the slope of the logarithm of this number over log k.
The claim of arXiv 2509.01649:

* where a row has O(k) successors, O(k^2 log k) samples without and O(k log k) with a teacher;
* where a row has a constant number of successors, no difference in order.

Over these sizes k log k has a slope of 1.19, k^2 of 2, and k^2 log k, which is a bound, of 2.19.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from chain import Chain, Floats, Ids, add_wrong_ids, make_chain

from megatron_kd.storage.atomic_files import write_atomically

ALPHAS = {"plain": 0.0, "dpt50": 0.5, "dpt90": 0.9, "dpt90_routed": 0.9}
SIZES = (64, 128, 256, 512, 1024)
CURVE_IDS = 64  # vocabulary of the error curve


def main() -> None:
    """Write the error curve, or with --complexity the samples needed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the chain and its samples (1)")
    parser.add_argument("--loss", choices=list(ALPHAS), default="plain", help="(plain)")
    parser.add_argument(
        "--teacher", choices=["exact", "imperfect"], default="exact", help="(exact)"
    )
    parser.add_argument(
        "--complexity", action="store_true", help="samples needed against the number of ids"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.2, help="--complexity: largest error of any row (0.2)"
    )
    arguments = parser.parse_args()
    if arguments.complexity:
        result = sample_complexity(arguments.seed, arguments.tolerance)
    else:
        result = error_curve(arguments.seed, arguments.loss, arguments.teacher)
    write_atomically(arguments.json, json.dumps(result, indent=1).encode())


def optimal_table(
    counts: Ids, teacher: Floats, alpha: float, routed: NDArray[np.bool_] | None = None
) -> Floats:
    """Return the table that minimises the loss; rows without samples are uniform.

    Args:
        counts: Number of samples of each transition, int64 [V, V].
        teacher: Probabilities of the teacher, fp64 [V, V].
        alpha: Weight of the distillation loss.
        routed: True for rows that learn from their labels alone, bool [V].

    Returns:
        Probabilities of the next id, fp64 [V, V].
    """
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    weight = (
        np.full((len(counts), 1), alpha)
        if routed is None
        else np.where(routed, 0.0, alpha)[:, None]
    )
    table: Floats = np.where(totals > 0, (1 - weight) * shares + weight * teacher, 1 / len(counts))
    return table


def row_errors(table: Floats, rows: Floats) -> Floats:
    """Return the total variation distance of each row, fp64 [V]."""
    distance: Floats = 0.5 * np.abs(table - rows).sum(1)
    return distance


def draw_counts(chain: Chain, count: int, rng: np.random.Generator) -> Ids:
    """Return the counts, int64 [V, V], of `count` transitions from ids drawn uniformly."""
    starts = rng.multinomial(count, np.full(chain.vocab_size, 1 / chain.vocab_size))
    return np.stack(
        [rng.multinomial(number, row) for number, row in zip(starts, chain.rows, strict=True)]
    )


def error_curve(seed: int, loss: str, teacher_name: str) -> dict[str, Any]:
    """Return the mean error of high- and low-entropy rows against the number of samples.

    Args:
        seed: Seed of the chain and its samples.
        loss: A key of `ALPHAS`.
        teacher_name: "exact" or "imperfect".
    """
    chain = make_chain(CURVE_IDS, successors=16, triggers=0, noise=0.05, seed=seed)
    rng = np.random.default_rng([seed, 3])
    teacher = chain.rows
    if teacher_name == "imperfect":
        teacher = add_wrong_ids(chain.rows, np.arange(CURVE_IDS), wrong=0.3, ids=4, seed=seed)
    routed = lowest_entropy_rows(teacher, 0.15) if loss == "dpt90_routed" else None
    counts = np.zeros((CURVE_IDS, CURVE_IDS), dtype=np.int64)
    points, total = [], 0
    for samples in np.unique(np.geomspace(64, 200_000, 30).astype(int)):
        counts = counts + draw_counts(chain, int(samples) - total, rng)
        total = int(samples)
        errors = row_errors(optimal_table(counts, teacher, ALPHAS[loss], routed), chain.rows)
        points.append(
            {
                "samples": total,
                "high": float(errors[chain.high].mean()),
                "low": float(errors[~chain.high].mean()),
            }
        )
    middle = points[len(points) // 2]
    return {
        "high": middle["high"],
        "low": middle["low"],
        "final_high": points[-1]["high"],
        "final_low": points[-1]["low"],
        "points": points,
    }


def lowest_entropy_rows(teacher: Floats, share: float) -> NDArray[np.bool_]:
    """Return True for the share of rows with the lowest entropy, bool [V].

    The threshold lies among the low-entropy rows. Rows of equal entropy are all in or all out.
    """
    entropy = -(teacher * np.log(np.maximum(teacher, 1e-300))).sum(1)
    lowest: NDArray[np.bool_] = entropy <= np.quantile(entropy, share, method="inverted_cdf") + 1e-9
    return lowest


def samples_needed(chain: Chain, alpha: float, tolerance: float, rng: np.random.Generator) -> int:
    """Return the number of samples after which no row has an error above `tolerance`.

    Samples are added in steps of 3 %. The teacher is perfect.

    Args:
        chain: Chain to learn.
        alpha: Weight of the distillation loss.
        tolerance: Largest total variation distance of any row.
        rng: Generator of the samples.
    """
    counts, total = np.zeros((chain.vocab_size, chain.vocab_size), dtype=np.int64), 0
    while True:
        step = max(chain.vocab_size // 4, total * 3 // 100, 1)
        counts, total = counts + draw_counts(chain, step, rng), total + step
        if row_errors(optimal_table(counts, chain.rows, alpha), chain.rows).max() <= tolerance:
            return total


def sample_complexity(seed: int, tolerance: float) -> dict[str, Any]:
    """Return the slopes over log k of the logarithm of the samples needed.

    Rows have k / 2 or 4 successors. The table is learned from samples alone or from a perfect
    teacher alone.
    """
    rng = np.random.default_rng([seed, 4])
    result: dict[str, Any] = {"points": []}
    for name, alpha in (("plain", 0.0), ("distilled", 1.0)):
        for width in ("half", "constant"):
            samples = []
            for size in SIZES:
                chain = high_entropy_chain(size, size // 2 if width == "half" else 4, seed)
                samples.append(samples_needed(chain, alpha, tolerance, rng))
            result["points"] += [
                {"what": f"{name}, {width}", "k": k, "samples": n}
                for k, n in zip(SIZES, samples, strict=True)
            ]
            slope = np.polyfit(np.log(SIZES), np.log(samples), 1)[0]
            result[f"slope_{name}_{width}"] = float(slope)
    return result


def high_entropy_chain(size: int, successors: int, seed: int) -> Chain:
    """Return a chain of `size` ids that has high-entropy rows alone, each of them twice."""
    chain = make_chain(size, successors=successors, triggers=0, noise=0.0, seed=seed)
    rows = chain.rows[chain.high][np.arange(size) % (size // 2)]
    return Chain(rows, np.ones(size, dtype=bool), chain.triggers)


if __name__ == "__main__":
    main()
