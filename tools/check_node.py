"""Whether the nodes of a job are fit to train on: devices, disk, clocks, and one all-reduce between all ranks.

    srun python tools/check_node.py --directory runs/student            # MASTER_ADDR and MASTER_PORT as for training
    torchrun --nproc-per-node 8 tools/check_node.py --directory runs/student

One process a rank, as for training. Rank 0 collects what the others found through the rendezvous store, so a rank that never answers is
found too, and prints a table and, where something is bad, the option that leaves the bad nodes out: --exclude=node3,node7. Where no
all-reduce succeeds anywhere, no node is blamed for it.

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
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.atomic_files import write_atomically

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ELEMENTS = 1 << 18  # of the all-reduce: a mebibyte of fp32


def main(argv: list[str] | None = None) -> int:
    """Parse, check this rank, and on rank 0 all of them."""
    arguments = _parser().parse_args(argv)
    try:
        rank, world_size, local_rank = world_from_environment()
    except ConfigError as error:
        print(f"check_node: error: {error}", file=sys.stderr)
        return 2
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=arguments.timeout_seconds)
    address = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0")))
    # torchrun's own store listens there already.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*address, None, serves, timeout=limit, wait_for_workers=False)
    store = dist.PrefixStore(
        f"check_node/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )
    local = check_here(arguments, local_rank)
    store.set(f"here/{rank}", json.dumps(local))
    if rank == 0:
        return _judge_all(store, arguments, world_size, local)
    if local_rank == 0:
        _tell_time(store, rank)
    problem = all_reduce(store, arguments, rank, world_size, local_rank)
    store.set(f"reduced/{rank}", problem or "")
    # Rank 0 has the last word, so that a launcher that stops the others at the first failure does not stop it.
    store.wait(["verdict"], datetime.timedelta(seconds=3 * arguments.timeout_seconds))
    return int(store.get("verdict"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="on the file system that the run writes"
    )
    parser.add_argument(
        "--min-free-gb", type=float, default=50.0, help="free there at least, 1e9 bytes (50)"
    )
    parser.add_argument(
        "--min-free-inodes", type=int, default=10_000, help="free there at least (10000)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto: cuda where torch finds it",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=float,
        default=5.0,
        help="clocks may differ from rank 0's by this (5)",
    )
    parser.add_argument(
        "--timeout-seconds", type=float, default=120.0, help="for each of the ranks' answers (120)"
    )
    parser.add_argument(
        "--exclude-file",
        type=Path,
        help="rank 0 writes the bad nodes here, separated by commas; nothing: an empty file",
    )
    return parser


def node_name() -> str:
    """Slurm's name of this node where there is one: several may share a host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_here(arguments: argparse.Namespace, local_rank: int) -> dict[str, Any]:
    """What this rank can see by itself: {"node": name, "problems": [sentence, ...]}."""
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
    """Of the file system of `directory`: space, inodes, and whether a file can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as stream:
            stream.write(b"x")
            stream.flush()
            os.fsync(stream.fileno())
        found = os.statvfs(directory)
    except OSError as error:
        return [f"{directory} cannot be written: {error.strerror}"]
    free = found.f_bavail * found.f_frsize / 1e9
    problems = []
    if free < min_free_gb:
        problems.append(f"{free:.1f} GB free in {directory}, {min_free_gb:g} wanted")
    if 0 < found.f_files and found.f_favail < min_free_inodes:  # some file systems count none
        problems.append(f"{found.f_favail} inodes free in {directory}, {min_free_inodes} wanted")
    return problems


def all_reduce(
    store: Any, arguments: argparse.Namespace, rank: int, world_size: int, local_rank: int
) -> str | None:
    """Sum one tensor over all ranks and compare; what went wrong, in words. Collective over the world."""
    import torch
    import torch.distributed as dist

    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    try:
        limit = datetime.timedelta(seconds=arguments.timeout_seconds)
        if cuda:
            torch.cuda.set_device(local_rank)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("reduce", store),
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
        sums = torch.full(
            (ELEMENTS,), float(rank + 1), device=torch.device("cuda", local_rank) if cuda else None
        )
        dist.all_reduce(sums)
        wanted = world_size * (world_size + 1) / 2
        wrong = int((sums != wanted).sum())
        dist.destroy_process_group()
    except Exception as error:
        return f"all-reduce failed: {' '.join(str(error).split())[:200]}"
    return f"all-reduce gave {wrong} wrong sums of {ELEMENTS}" if wrong else None


def _tell_time(store: Any, rank: int) -> None:
    """Answer rank 0's question with this node's clock."""
    store.wait([f"ask/{rank}"])
    store.set(f"clock/{rank}", repr(time.time()))


def _skew(store: Any, rank: int) -> float:
    """Seconds that the node's clock differs from this one by, at least: the answer's way there and back is taken off."""
    begin = time.time()
    store.set(f"ask/{rank}", "1")
    told = float(store.get(f"clock/{rank}"))
    end = time.time()
    return max(begin - told, told - end, 0.0)


def _judge_all(
    store: Any, arguments: argparse.Namespace, world_size: int, local: dict[str, Any]
) -> int:
    """Rank 0: what every rank said, as a table, and the verdict."""
    answers = _collect(store, "here", world_size, arguments.timeout_seconds)
    found = {rank: json.loads(text) for rank, text in answers.items()}
    problems = [
        (each["node"], f"rank {rank}: {problem}")
        for rank, each in sorted(found.items())
        for problem in each["problems"]
    ]
    silent = sorted(set(range(world_size)) - set(found))
    seen = {local["node"]}
    for rank, each in sorted(found.items()):
        if each["node"] in seen:
            continue
        seen.add(each["node"])
        skew = _skew(store, rank)
        if skew > arguments.max_skew_seconds:
            problems.append((each["node"], f"its clock differs by {skew:.1f} s"))
    everywhere = ""
    if not silent:
        store.set(
            "reduced/0",
            all_reduce(store, arguments, 0, world_size, int(os.environ.get("LOCAL_RANK", 0))) or "",
        )
        reduced = _collect(store, "reduced", world_size, arguments.timeout_seconds)
        failed = {
            rank: reduced.get(rank, "no answer to the all-reduce")
            for rank in range(world_size)
            if reduced.get(rank) != ""
        }
        if len(failed) == world_size:
            everywhere = f"no all-reduce succeeded on any rank; rank 0: {failed[0]}"
        else:
            problems += [
                (found[rank]["node"], f"rank {rank}: {problem}")
                for rank, problem in sorted(failed.items())
            ]
    code = _report(arguments, problems, silent, everywhere, nodes=len(seen), world_size=world_size)
    store.set("verdict", str(code))
    time.sleep(0.5)  # the store is here: let the others read
    return code


def _collect(store: Any, name: str, world_size: int, seconds: float) -> dict[int, str]:
    """The answers of the ranks that gave one in time."""
    deadline, found = time.monotonic() + seconds, {}
    for rank in range(world_size):
        left = max(0.01, deadline - time.monotonic())
        try:
            store.wait([f"{name}/{rank}"], datetime.timedelta(seconds=left))
            found[rank] = store.get(f"{name}/{rank}").decode()
        except Exception as error:
            if "imeout" not in f"{type(error).__name__}{error}":
                raise
    return found


def silent_nodes(silent: list[int], world_size: int) -> list[str]:
    """Names of the nodes of ranks that never answered, as Slurm tells where it placed them; none where it does not."""
    names = expand(os.environ.get("SLURM_STEP_NODELIST", ""))
    per_node = world_size // len(names) if names and world_size % len(names) == 0 else 0
    return sorted({names[rank // per_node] for rank in silent}) if per_node else []


def expand(text: str) -> list[str]:
    """The names in a list of Slurm's: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login. One pair of brackets in a name."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(
        r"([^,\[\]]+)(?:\[([^\]]*)\]([^,\[\]]*))?(?:,|$)", text
    ):
        for each in ranges.split(",") if ranges else [""]:
            first, _, last = each.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            names += [
                f"{prefix}{'' if n is None else str(n).zfill(len(first))}{suffix}" for n in numbers
            ]
    return names


def _report(
    arguments: argparse.Namespace,
    problems: list[tuple[str, str]],
    silent: list[int],
    everywhere: str,
    *,
    nodes: int,
    world_size: int,
) -> int:
    lost = silent_nodes(silent, world_size)
    for node, problem in problems:
        print(f"check_node: {node}: {problem}")
    if silent:
        shown = ", ".join(map(str, silent[:16])) + (" and more" if len(silent) > 16 else "")
        print(f"check_node: no answer from rank {shown} ({', '.join(lost) or 'nodes unknown'})")
    if everywhere:
        print(f"check_node: {everywhere}")
    bad = sorted({node for node, _ in problems if NODE_NAME.fullmatch(node)} | set(lost))
    if arguments.exclude_file is not None:
        write_atomically(arguments.exclude_file, f"{','.join(bad)}\n".encode() if bad else b"")
    if not (problems or silent or everywhere):
        print(f"check_node: {world_size} ranks on {nodes} nodes are fit", flush=True)
        return 0
    print(
        f"check_node: leave these out: --exclude={','.join(bad)}"
        if bad
        else "check_node: no single node is to blame",
        flush=True,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
