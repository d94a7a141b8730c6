"""Check that the nodes of a job are fit for training: devices, disk, clocks and an all-reduce.

    # MASTER_ADDR and MASTER_PORT as for training
    srun python tools/check_node.py --directory runs/student
    torchrun --nproc-per-node 8 tools/check_node.py --directory runs/student

Start one process per rank, as for training. Rank 0 collects the results of the others through the
rendezvous store, so a rank that never answers is found too. It prints a table and, if something is
bad, the option that excludes the bad nodes: --exclude=node3,node7. If no all-reduce succeeds on any
rank, no node is blamed for it.

Exit codes: 0 all fit, 1 something is bad, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.storage.exit_codes import BAD_INPUT, FAILED, FINISHED

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ELEMENTS = 1 << 18  # of the all-reduce: a mebibyte of fp32
_MAX_NAMED = 16  # ranks that one line names


@dataclass
class Verdict:
    """Collect what is wrong with the nodes of a job.

    Attributes:
        nodes: Names of the nodes that answered.
        problems: Pairs of a node and a message.
        silent_ranks: Ranks that gave no answer.
        common_problem: Message about all ranks together, if no all-reduce succeeded; else empty.
    """

    nodes: set[str]
    problems: list[tuple[str, str]] = field(default_factory=list)
    silent_ranks: list[int] = field(default_factory=list)
    common_problem: str = ""

    @property
    def is_fit(self) -> bool:
        """Return True if nothing is wrong."""
        return not (self.problems or self.silent_ranks or self.common_problem)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        rank, world_size, local_rank = world_from_environment()
    except ConfigError as error:
        print(f"check_node: error: {error}", file=sys.stderr)
        return BAD_INPUT
    store = _connect(rank, arguments.timeout_seconds)
    local = check_rank(arguments, local_rank)
    store.set(f"here/{rank}", json.dumps(local))
    if rank == 0:
        return _judge_all(store, arguments, world_size, local["node"])
    if local_rank == 0:
        _answer_clock(store, rank)
    problem = all_reduce(store, arguments, rank, world_size, local_rank)
    store.set(f"reduced/{rank}", problem or "")
    # Every rank ends with the verdict of rank 0. A launcher that stops all ranks at the first
    # failure must not stop rank 0 before it.
    store.wait(["verdict"], datetime.timedelta(seconds=3 * arguments.timeout_seconds))
    return int(store.get("verdict"))


def _connect(rank: int, timeout_seconds: float) -> Any:
    """Connect to the rendezvous store, or start it on rank 0."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_seconds)
    address = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0")))
    # The store of torchrun already listens there.
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*address, None, is_server, timeout=timeout, wait_for_workers=False)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"check_node/{restart}", store)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="folder on the file system of the run"
    )
    parser.add_argument(
        "--min-free-gb", type=float, default=50.0, help="free space that is needed, 1e9 bytes (50)"
    )
    parser.add_argument(
        "--min-free-inodes", type=int, default=10_000, help="free inodes that are needed (10000)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto: cuda if torch finds it",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=float,
        default=5.0,
        help="largest difference of a clock from rank 0's (5)",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=120.0,
        help="longest wait for each answer of a rank (120)",
    )
    parser.add_argument(
        "--exclude-file",
        type=Path,
        help="file for the bad nodes, separated by commas; empty if there are none",
    )
    return parser


def node_name() -> str:
    """Return Slurm's name of this node if there is one, since several may share a host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_rank(arguments: argparse.Namespace, local_rank: int) -> dict[str, Any]:
    """Check what this rank can check by itself: {"node": name, "problems": [message, ...]}."""
    import torch

    problems = []
    if arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        if local_rank >= count:
            problems.append(f"{count} GPUs, so process {local_rank} has none")
    elif (
        arguments.device == "auto"
        and os.environ.get("CUDA_VISIBLE_DEVICES")
        and shutil.which("nvidia-smi")
    ):
        problems.append("GPUs are assigned, but torch finds none")
    if local_rank == 0:
        problems += disk_problems(
            arguments.directory, arguments.min_free_gb, arguments.min_free_inodes
        )
    return {"node": node_name(), "problems": problems}


def disk_problems(directory: Path, min_free_gb: float, min_free_inodes: int) -> list[str]:
    """Check space and inodes of the file system of a directory, and that it can be written.

    Args:
        directory: The directory; it is made.
        min_free_gb: Space that must be free, 1e9 bytes.
        min_free_inodes: Inodes that must be free.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as stream:
            stream.write(b"x")
            stream.flush()
            os.fsync(stream.fileno())
        usage = os.statvfs(directory)
    except OSError as error:
        return [f"{directory} cannot be written: {error.strerror}"]
    free = usage.f_bavail * usage.f_frsize / 1e9
    problems = []
    if free < min_free_gb:
        problems.append(f"{free:.1f} GB free in {directory}, {min_free_gb:g} needed")
    if 0 < usage.f_files and usage.f_favail < min_free_inodes:  # some file systems count none
        problems.append(f"{usage.f_favail} inodes free in {directory}, {min_free_inodes} needed")
    return problems


def all_reduce(
    store: Any, arguments: argparse.Namespace, rank: int, world_size: int, local_rank: int
) -> str | None:
    """Sum a tensor over all ranks, and return a message if that fails. Collective over the world.

    Args:
        store: The rendezvous store.
        arguments: Device and time limit.
        rank: This rank of the world.
        world_size: Ranks of the world.
        local_rank: Number of this process on its node.
    """
    import torch
    import torch.distributed as dist

    is_cuda = arguments.device == "cuda" or (
        arguments.device == "auto" and torch.cuda.is_available()
    )
    try:
        if is_cuda:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("reduce", store),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=arguments.timeout_seconds),
        )
        device = torch.device("cuda", local_rank) if is_cuda else None
        sums = torch.full((ELEMENTS,), float(rank + 1), device=device)
        dist.all_reduce(sums)
        wrong = int((sums != world_size * (world_size + 1) / 2).sum())
        dist.destroy_process_group()
    except Exception as error:
        return f"all-reduce failed: {' '.join(str(error).split())[:200]}"
    return f"all-reduce gave {wrong} wrong sums of {ELEMENTS}" if wrong else None


def _answer_clock(store: Any, rank: int) -> None:
    """Answer rank 0's question with the clock of this node."""
    store.wait([f"ask/{rank}"])
    store.set(f"clock/{rank}", repr(time.time()))


def _skew(store: Any, rank: int) -> float:
    """Return a lower bound of the difference of a node's clock from this one, seconds.

    The time that question and answer take is subtracted.
    """
    begin = time.time()
    store.set(f"ask/{rank}", "1")
    clock = float(store.get(f"clock/{rank}"))
    end = time.time()
    return max(begin - clock, clock - end, 0.0)


def _judge_all(store: Any, arguments: argparse.Namespace, world_size: int, local_node: str) -> int:
    """Collect the results of all ranks on rank 0, print them and publish the exit code."""
    texts = _collect(store, "here", world_size, arguments.timeout_seconds)
    answers = {rank: json.loads(text) for rank, text in sorted(texts.items())}
    verdict = Verdict(nodes={answer["node"] for answer in answers.values()})
    verdict.silent_ranks = sorted(set(range(world_size)) - set(answers))
    for rank, answer in answers.items():
        verdict.problems += [
            (answer["node"], f"rank {rank}: {text}") for text in answer["problems"]
        ]
    verdict.problems += _clock_problems(store, answers, local_node, arguments.max_skew_seconds)
    if not verdict.silent_ranks:
        _judge_all_reduce(store, arguments, answers, verdict)
    code = _report(arguments, verdict, world_size)
    store.set("verdict", str(code))
    time.sleep(0.5)  # this process holds the store: let the others read it
    return code


def _clock_problems(
    store: Any, answers: dict[int, dict[str, Any]], local_node: str, max_skew_seconds: float
) -> list[tuple[str, str]]:
    """Compare the clock of each other node, through its first rank."""
    problems, compared_nodes = [], {local_node}
    for rank, answer in answers.items():
        if answer["node"] in compared_nodes:
            continue
        compared_nodes.add(answer["node"])
        skew = _skew(store, rank)
        if skew > max_skew_seconds:
            problems.append((answer["node"], f"its clock differs by {skew:.1f} s"))
    return problems


def _judge_all_reduce(
    store: Any, arguments: argparse.Namespace, answers: dict[int, dict[str, Any]], verdict: Verdict
) -> None:
    """Take part in the all-reduce on rank 0, and add the failures of all ranks to the verdict."""
    world_size = len(answers)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    store.set("reduced/0", all_reduce(store, arguments, 0, world_size, local_rank) or "")
    results = _collect(store, "reduced", world_size, arguments.timeout_seconds)
    failures = {
        rank: results.get(rank, "no answer to the all-reduce")
        for rank in range(world_size)
        if results.get(rank) != ""
    }
    if len(failures) == world_size:
        verdict.common_problem = f"no all-reduce succeeded on any rank; rank 0: {failures[0]}"
        return
    verdict.problems += [
        (answers[rank]["node"], f"rank {rank}: {problem}") for rank, problem in failures.items()
    ]


def _collect(store: Any, name: str, world_size: int, seconds: float) -> dict[int, str]:
    """Return the answers of the ranks that answered in time."""
    deadline, answers = time.monotonic() + seconds, {}
    for rank in range(world_size):
        remaining = max(0.01, deadline - time.monotonic())
        try:
            store.wait([f"{name}/{rank}"], datetime.timedelta(seconds=remaining))
            answers[rank] = store.get(f"{name}/{rank}").decode()
        except Exception as error:
            if "imeout" not in f"{type(error).__name__}{error}":
                raise
    return answers


def silent_nodes(silent_ranks: list[int], world_size: int) -> list[str]:
    """Return the names of the nodes where Slurm placed the ranks; none if it does not say."""
    names = expand(os.environ.get("SLURM_STEP_NODELIST", ""))
    per_node = world_size // len(names) if names and world_size % len(names) == 0 else 0
    return sorted({names[rank // per_node] for rank in silent_ranks}) if per_node else []


def expand(text: str) -> list[str]:
    """Return the names in a node list of Slurm.

    "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login. A name has one pair of brackets.
    """
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(
        r"([^,\[\]]+)(?:\[([^\]]*)\]([^,\[\]]*))?(?:,|$)", text
    ):
        for number_range in ranges.split(",") if ranges else [""]:
            first, _, last = number_range.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            names += [
                f"{prefix}{'' if n is None else str(n).zfill(len(first))}{suffix}" for n in numbers
            ]
    return names


def _report(arguments: argparse.Namespace, verdict: Verdict, world_size: int) -> int:
    """Print the verdict, write the bad nodes to a file, and return the exit code."""
    silent_names = silent_nodes(verdict.silent_ranks, world_size)
    for node, problem in verdict.problems:
        print(f"check_node: {node}: {problem}")
    if verdict.silent_ranks:
        ranks = ", ".join(map(str, verdict.silent_ranks[:_MAX_NAMED]))
        more = " and more" if len(verdict.silent_ranks) > _MAX_NAMED else ""
        names = ", ".join(silent_names) or "nodes unknown"
        print(f"check_node: no answer from rank {ranks}{more} ({names})")
    if verdict.common_problem:
        print(f"check_node: {verdict.common_problem}")
    bad_nodes = {node for node, _ in verdict.problems if NODE_NAME.fullmatch(node)}
    bad_list = ",".join(sorted(bad_nodes | set(silent_names)))
    if arguments.exclude_file is not None:
        write_atomically(arguments.exclude_file, f"{bad_list}\n".encode() if bad_list else b"")
    if verdict.is_fit:
        print(f"check_node: {world_size} ranks on {len(verdict.nodes)} nodes are fit", flush=True)
        return FINISHED
    if bad_list:
        print(f"check_node: exclude these nodes: --exclude={bad_list}", flush=True)
    else:
        print("check_node: no single node is to blame", flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
