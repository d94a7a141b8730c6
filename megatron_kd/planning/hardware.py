"""What a cluster is to the planner: ranks, their memory and rate, and the links between them.

Bandwidths here are what one GPU sends in one direction, in bytes a second. Ranks are numbered as in `parallel.groups`: tensor fastest,
then data, then pipeline; nodes hold neighbouring ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_kd.config import ConfigError
from megatron_kd.planning.flops import peak_tflops

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU by its vendor's data sheet. device: its name for `peak_tflops`. memory: GiB; memory_bandwidth, intra: GB/s, intra the
    links within a node in one direction (data sheets state both together); inter: GB/s of network a GPU in the vendor's own server."""

    device: str
    memory: float
    memory_bandwidth: float
    intra: float
    inter: float
    gpus_per_node: int = 8


# Data sheets: NVIDIA A100 (80 and 40 GB SXM), H100 SXM, H200 SXM, DGX B200, L40S (PCIe 4.0 x16 between GPUs); AMD Instinct MI300X. The
# network is that of DGX A100 (200 Gb/s a GPU), DGX H100, H200 and B200 (400 Gb/s a GPU); elsewhere 200 or 400 Gb/s are assumed.
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100", 80, 2039, 300, 25),
    "a100-40gb": Gpu("A100", 40, 1555, 300, 25),
    "h100": Gpu("H100", 80, 3350, 450, 50),
    "h200": Gpu("H200", 141, 4800, 450, 50),
    "b200": Gpu("B200", 180, 8000, 900, 50),
    "l40s": Gpu("L40S", 48, 864, 32, 25),
    "mi300x": Gpu("MI300X", 192, 5300, 448, 50),
}

# Assumptions where nothing was measured; each has an option of tools/plan.py.
LINK_EFFICIENCY = 0.75  # share of a link's bandwidth that collectives of large messages reach
MEMORY_EFFICIENCY = 0.8  # share of the memory's bandwidth that elementwise passes reach
LATENCY = 2e-5  # seconds of one collective or message, however small
FRAMEWORK = (
    3 * GIB
)  # CUDA context, libraries' workspaces, NCCL's buffers and the allocator's unused remainders


@dataclass(frozen=True)
class Cluster:
    """ranks: all of them. memory, framework: bytes a rank. peak: FLOP/s of one rank, or 1 where rates are measured in FLOP/s outright;
    intra, inter, memory_bandwidth: bytes/s that are reached. latency: seconds a collective."""

    ranks: int
    gpus_per_node: int
    memory: float
    peak: float
    memory_bandwidth: float
    intra: float
    inter: float
    latency: float = LATENCY
    framework: float = FRAMEWORK
    device: Literal["cuda", "cpu"] = "cuda"
    name: str = ""
    measured_row_bandwidth: float | None = None

    @property
    def row_bandwidth(self) -> float:
        """Bytes/s of logits in one pass that subtracts, exponentiates and sums: on a GPU the memory's, on a CPU measured."""
        return self.measured_row_bandwidth or self.memory_bandwidth

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.ranks // self.gpus_per_node)

    def bandwidth(self, size: int, stride: int) -> float:
        """What one rank of a group of `size` ranks, `stride` apart, sends in a ring, bytes/s.

        A ring leaves a node once for all of its members there, and each of those has a network card: a group with k members in a node
        has k cards, but never more than the links within the node carry.
        """
        if (
            size == 1
            or (size - 1) * stride < self.gpus_per_node
            and size * stride <= self.gpus_per_node
        ):
            return self.intra
        members = max(1, self.gpus_per_node // stride)
        return min(self.intra, self.inter * members)


def known_gpu(name: str) -> Gpu:
    """The data sheet of a GPU. ConfigError for one that is not in the table."""
    if name.lower() not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known ({', '.join(GPUS)}): give its numbers as --gpu-memory-gib, --peak-tflops, "
            "--memory-bandwidth-gbs, --intra-bandwidth-gbs and --inter-bandwidth-gbs"
        )
    return GPUS[name.lower()]


def cluster_of(
    gpu: Gpu, ranks: int, *, link_efficiency: float = LINK_EFFICIENCY, name: str = ""
) -> Cluster:
    """`ranks` GPUs of one kind."""
    peak = peak_tflops(gpu.device)
    assert peak is not None
    return Cluster(
        ranks=ranks,
        gpus_per_node=gpu.gpus_per_node,
        memory=gpu.memory * GIB,
        peak=peak * 1e12,
        memory_bandwidth=gpu.memory_bandwidth * 1e9 * MEMORY_EFFICIENCY,
        intra=gpu.intra * 1e9 * link_efficiency,
        inter=gpu.inter * 1e9 * link_efficiency,
        name=name,
    )
