"""Hold the catalogue of faults that tests inject, and write the table of their outcomes.

Tests name faults with `pytest.mark.fault`. `pytest -m fault --fault-table FILE` runs all of them,
also slow ones, and writes what was measured to FILE, tests/operations/FAULTS.md. A test reports a
measurement with `record_property("measured", ...)`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version

from megatron_kd.storage.provenance import commit


@dataclass(frozen=True)
class Fault:
    """Hold what is injected, and the criterion of passing."""

    injected: str
    criterion: str


FAULTS: dict[str, Fault] = {
    "1": Fault(
        "SIGKILL in every phase of a save, and at random moments",
        "the last committed step is resumed; rows and weights as of a run left alone, to the bit",
    ),
    "2": Fault(
        "SIGKILL while a save is written in the background",
        "the newest complete checkpoint is the one before; no half folder is taken for one",
    ),
    "3": Fault(
        "SIGKILL of an extraction in the middle of a shard; resumed on another number of processes",
        "the files of an uninterrupted extraction, to the byte",
    ),
    "4": Fault(
        "SIGTERM, SIGUSR1, SIGUSR2, stop file, time limit; by kill and by Slurm",
        "saved after the same step on every rank; exit code 85 or 93; requeued once",
    ),
    "5": Fault(
        "shards and checkpoint files cut, emptied, flipped, swapped, missing, duplicated",
        "named with what was expected and found; never a wrong number",
    ),
    "6": Fault(
        "full disk, file size limit, folder that cannot be written",
        "one sentence, exit code 5, what was saved before intact",
    ),
    "7": Fault(
        "rank killed, stopped, hung in a collective, slow",
        "every other ends within the time limit, naming rank and machine; "
        "the slowest is in every row",
    ),
    "8": Fault(
        "not-a-number in weights, gradients, the teacher, stored values",
        "stop or skip by policy; counted; no weight touched",
    ),
    "9": Fault(
        "student, teacher, data and cache of different vocabularies, also of one size",
        "refused before step 0 with both digests",
    ),
    "10": Fault(
        "another tensor, pipeline, data-parallel size or microbatch at resumption",
        "the same samples; loss within 1e-5",
    ),
    "11": Fault(
        "another K, temperature, sequence length, batch, data, seed at resumption",
        "refused, naming each; or recorded where allowed",
    ),
    "12": Fault("code in .metadata, common.pt, .npy, .bin weights, tokenizer files", "never run"),
    "13": Fault(
        "absolute names, .. and links in manifests and archives", "refused; nothing written outside"
    ),
    "14": Fault(
        "shell characters and newlines in job names, paths, run files", "inert, or refused"
    ),
    "15": Fault(
        "two writers of one cache, two runs in one directory",
        "the second is told who holds it; a dead holder is found out",
    ),
    "16": Fault(
        "files that a shared disk shows late, empty or in part",
        "waited for by content, or named; never read as they are",
    ),
    "17": Fault(
        "a save that fails, with room for one checkpoint only",
        "a verified checkpoint always remains",
    ),
    "18": Fault(
        "a run that fails at the same step each time",
        "the launcher stops after a few attempts without progress",
    ),
    "19": Fault(
        "clocks of ranks that differ, at the time limit", "all ranks leave after the same step"
    ),
    "20": Fault(
        "a package missing that only a worker would miss", "one sentence at the start, no hang"
    ),
}

SILENT: dict[str, Fault] = {
    "S1": Fault(
        "background saves that write the first state again and again (NeMo-RL 3312)",
        "each checkpoint holds its own step's state",
    ),
    "S2": Fault(
        "a background save that changes what training goes on with, or is changed by it "
        "(Megatron-LM 1713, 1570)",
        "the files of a save in the foreground",
    ),
    "S3": Fault(
        "a stuck writer whose half files are published (Megatron-LM 2422)",
        "reported in time, never complete",
    ),
    "S4": Fault(
        '"saved" said before the files are durable (Megatron-LM 1763)',
        "the commit marker comes last",
    ),
    "S5": Fault(
        "a late completion that finishes the next save early (Megatron-Bridge 5117)",
        "complete only when every rank's files are",
    ),
    "S6": Fault("background saves that are never found at resumption (verl 7952)", "they are"),
    "S7": Fault(
        "newest advanced before it is durable, and the good one removed (KempnerForge 102)",
        "only what a verified newer one replaces goes",
    ),
    "S8": Fault(
        "data positions applied twice or in other units at resumption "
        "(Megatron-Bridge 4565, ms-swift 10099)",
        "the same microbatches from anywhere",
    ),
    "S9": Fault(
        "an index that only the first rank has (Megatron-LM 907)",
        "refused in words, or built where it is missing",
    ),
    "S10": Fault("a cut index that is read (litData 351)", "named"),
}

CATALOGUE = FAULTS | SILENT


@dataclass(frozen=True)
class FaultOutcome:
    """Hold the result of one test ("passed", "failed", "skipped"), and what it measured."""

    test: str
    result: str
    seconds: float
    measured: str


def table(outcomes: Mapping[str, Sequence[FaultOutcome]]) -> str:
    """Return the page with one line for each fault.

    Args:
        outcomes: Outcomes of its tests by the number of the fault.
    """
    lines = [
        "# Faults, and what came of them",
        "",
        f"Written by `pytest -m fault --fault-table tests/operations/FAULTS.md` on {date.today()}: "
        f"commit {commit()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}, gloo, {platform.machine()}.",
        "",
        "| | Fault | Criterion | Outcome | Measured | Tests |",
        "|---|---|---|---|---|---|",
    ]
    for number, fault in CATALOGUE.items():
        members = outcomes.get(number, ())
        tests = ", ".join(dict.fromkeys(f"`{outcome.test.split('[')[0]}`" for outcome in members))
        lines.append(
            f"| {number} | {fault.injected} | {fault.criterion} | {_verdict(members)} "
            f"| {_measured(members)} | {tests} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(outcomes: Sequence[FaultOutcome]) -> str:
    results = {outcome.result for outcome in outcomes}
    if not outcomes:
        return "not run"
    if "failed" in results:
        return "FAILED"
    return "stood" if results == {"passed"} else ", ".join(sorted(results))


def _measured(outcomes: Sequence[FaultOutcome]) -> str:
    if not outcomes:
        return ""
    measurements = dict.fromkeys(outcome.measured for outcome in outcomes if outcome.measured)
    num_passed = sum(outcome.result == "passed" for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return "; ".join([*measurements, f"{num_passed} of {len(outcomes)} cases, {seconds:.0f} s"])
