"""The sandbox's tabular learner: a table of next-id probabilities, learned from samples alone or from a teacher's distributions.

    python examples/bigram_sandbox/tabular.py --seed 1 --loss dpt90 --teacher imperfect --json OUT
    python examples/bigram_sandbox/tabular.py --seed 1 --complexity --json OUT

The minimiser of (1 - alpha) * cross-entropy + alpha * distillation over a table is known: the mixture of the counts' shares and the
teacher's distribution, in every row that has been seen. So nothing is trained; only the number of samples matters. --complexity counts the
samples until every row's total variation error is at most `tolerance`, for growing vocabularies of k ids, and fits the slope of its
logarithm over log k: the claim of arXiv 2509.01649 is O(k^2 log k) without and O(k log k) with a teacher where a row has O(k) successors,
and no difference in order where it has a constant number. Over these sizes k log k itself has a slope of 1.19, k^2 2, and k^2 log k, which
is a bound, 2.19.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from chain import Chain, Floats, Ids, imperfect, make_chain

from megatron_kd.storage.atomic_files import write_atomically

ALPHAS = {"plain": 0.0, "dpt50": 0.5, "dpt90": 0.9, "dpt90_routed": 0.9}
SIZES = (64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the chain and its samples (1)")
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
        found = complexity(arguments.seed, arguments.tolerance)
    else:
        found = curve(arguments.seed, arguments.loss, arguments.teacher)
    write_atomically(arguments.json, json.dumps(found, indent=1).encode())


def learned(counts: Ids, teacher: Floats, alpha: float, routed: Any = None) -> Floats:
    """The table [V, V] that minimises the loss: rows that were never seen are uniform; rows of `routed` learn from their labels alone."""
    seen = counts.sum(1, keepdims=True)
    share = counts / np.maximum(seen, 1)
    weight = (
        np.full((len(counts), 1), alpha)
        if routed is None
        else np.where(routed, 0.0, alpha)[:, None]
    )
    return np.where(seen > 0, (1 - weight) * share + weight * teacher, 1 / len(counts))


def errors(table: Floats, rows: Floats) -> Floats:
    """Total variation distance of each row."""
    return 0.5 * np.abs(table - rows).sum(1)


def draw(chain: Chain, count: int, rng: np.random.Generator) -> Ids:
    """Counts [V, V] of `count` transitions from ids drawn uniformly."""
    starts = rng.multinomial(count, np.full(chain.vocab_size, 1 / chain.vocab_size))
    return np.stack(
        [rng.multinomial(number, row) for number, row in zip(starts, chain.rows, strict=True)]
    )


def curve(seed: int, loss: str, teacher: str) -> dict[str, Any]:
    """Mean error of high- and low-entropy rows against the number of samples."""
    chain = make_chain(64, successors=16, triggers=0, noise=0.05, seed=seed)
    rng = np.random.default_rng([seed, 3])
    said = chain.rows
    if teacher == "imperfect":
        said = imperfect(chain.rows, np.arange(64), wrong=0.3, ids=4, seed=seed)
    # The lowest 15 % of tokens by the teacher's entropy: the threshold lies among the low rows, and rows of one entropy go together.
    entropy = -(said * np.log(np.maximum(said, 1e-300))).sum(1)
    routed = (
        entropy <= np.quantile(entropy, 0.15, method="inverted_cdf") + 1e-9
        if loss == "dpt90_routed"
        else None
    )
    counts = np.zeros((64, 64), dtype=np.int64)
    points, total = [], 0
    for samples in np.unique(np.geomspace(64, 200_000, 30).astype(int)):
        counts = counts + draw(chain, int(samples) - total, rng)
        total = int(samples)
        error = errors(learned(counts, said, ALPHAS[loss], routed), chain.rows)
        points.append(
            {
                "samples": total,
                "high": float(error[chain.high].mean()),
                "low": float(error[~chain.high].mean()),
            }
        )
    at = points[len(points) // 2]
    return {
        "high": at["high"],
        "low": at["low"],
        "final_high": points[-1]["high"],
        "final_low": points[-1]["low"],
        "points": points,
    }


def samples_needed(chain: Chain, alpha: float, tolerance: float, rng: np.random.Generator) -> int:
    """Samples, in steps of 3 %, until every row's error is at most `tolerance`; the teacher is perfect."""
    counts, total = np.zeros((chain.vocab_size, chain.vocab_size), dtype=np.int64), 0
    while True:
        more = max(chain.vocab_size // 4, total * 3 // 100, 1)
        counts, total = counts + draw(chain, more, rng), total + more
        if errors(learned(counts, chain.rows, alpha), chain.rows).max() <= tolerance:
            return total


def complexity(seed: int, tolerance: float) -> dict[str, Any]:
    """Slopes over log k of log samples, with k / 2 and with 4 successors a row, from samples alone and from a perfect teacher alone."""
    rng = np.random.default_rng([seed, 4])
    found: dict[str, Any] = {"points": []}
    for name, alpha in (("plain", 0.0), ("distilled", 1.0)):
        for width in ("half", "constant"):
            needed = []
            for size in SIZES:
                chain = make_chain(
                    size,
                    successors=size // 2 if width == "half" else 4,
                    triggers=0,
                    noise=0.0,
                    seed=seed,
                )
                chain = Chain(
                    chain.rows[chain.high][np.arange(size) % (size // 2)],
                    np.ones(size, dtype=bool),
                    chain.triggers,
                )
                needed.append(samples_needed(chain, alpha, tolerance, rng))
            found["points"] += [
                {"what": f"{name}, {width}", "k": k, "samples": n}
                for k, n in zip(SIZES, needed, strict=True)
            ]
            found[f"slope_{name}_{width}"] = float(np.polyfit(np.log(SIZES), np.log(needed), 1)[0])
    return found


if __name__ == "__main__":
    main()
