"""Describe a cluster: its ranks, their memory and rate, and the links between them.

Bandwidths are what one GPU sends in one direction, in bytes per second. Ranks are numbered as in
`parallel.groups`: tensor fastest, then data, then pipeline. Nodes hold neighbouring ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_kd.config import ConfigError
from megatron_kd.planning.flops import peak_tflops

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """Hold the data sheet of one GPU.

    Attributes:
        device: its name for `peak_tflops`.
        memory: GiB.
        memory_bandwidth: GB/s.
        intra: GB/s of the links within a node in one direction (data sheets state both together).
        inter: GB/s of network per GPU in the vendor's server.
        gpus_per_node: GPUs of that server.
    """

    device: str
    memory: float
    memory_bandwidth: float
    intra: float
    inter: float
    gpus_per_node: int = 8


# Data sheets: NVIDIA A100 (80 and 40 GB SXM), H100 SXM, H200 SXM, DGX B200, L40S (PCIe 4.0 x16
# between GPUs); AMD Instinct MI300X. The network is that of DGX A100 (200 Gb/s per GPU), DGX H100,
# H200 and B200 (400 Gb/s per GPU). For the others 200 or 400 Gb/s are assumed.
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
LATENCY = 2e-5  # seconds of the smallest collective or message
# CUDA context, libraries' workspaces, NCCL's buffers and the allocator's unused remainders.
FRAMEWORK_BYTES = 3 * GIB


@dataclass(frozen=True)
class Cluster:
    """Hold the ranks of a cluster and the rates that they reach.

    Attributes:
        ranks: number of ranks.
        gpus_per_node: ranks of one node.
        memory: bytes of one rank.
        peak: FLOP/s of one rank, or 1 where rates are measured in FLOP/s directly.
        memory_bandwidth: bytes per second that one rank reaches; likewise intra and inter, the
            links within and between nodes.
        latency: seconds of one collective.
        framework: bytes of a rank that no tensor uses.
        device: "cuda" or "cpu".
        name: printed name.
        measured_row_bandwidth: measured value of `row_bandwidth`.
    """

    ranks: int
    gpus_per_node: int
    memory: float
    peak: float
    memory_bandwidth: float
    intra: float
    inter: float
    latency: float = LATENCY
    framework: float = FRAMEWORK_BYTES
    device: Literal["cuda", "cpu"] = "cuda"
    name: str = ""
    measured_row_bandwidth: float | None = None

    @property
    def row_bandwidth(self) -> float:
        """Return the bytes of logits per second in a pass that subtracts, exponentiates and sums.

        On a GPU it is that of the memory, on a CPU it is measured.
        """
        return self.measured_row_bandwidth or self.memory_bandwidth

    @property
    def nodes(self) -> int:
        """Return the number of machines."""
        return -(-self.ranks // self.gpus_per_node)

    def bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes per second that one rank of a group sends in a ring.

        A ring leaves a node once for all of its members in that node, and each of them has a
        network card. So a group with k members in a node has k cards, but never more than the
        links within the node carry.

        Args:
            size: ranks of the group.
            stride: distance of neighbouring ranks of the group.
        """
        fits_a_node = size * stride <= self.gpus_per_node
        if size == 1 or fits_a_node:
            return self.intra
        members = max(1, self.gpus_per_node // stride)
        return min(self.intra, self.inter * members)


def known_gpu(name: str) -> Gpu:
    """Return the data sheet of a GPU.

    Raises:
        ConfigError: if the GPU is not in the table.
    """
    if name.lower() not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known ({', '.join(GPUS)}): give its numbers as --gpu-memory-gib, "
            "--peak-tflops, --memory-bandwidth-gbs, --intra-bandwidth-gbs and "
            "--inter-bandwidth-gbs"
        )
    return GPUS[name.lower()]


def cluster_of(
    gpu: Gpu, ranks: int, *, link_efficiency: float = LINK_EFFICIENCY, name: str = ""
) -> Cluster:
    """Return a cluster of GPUs of one kind.

    Args:
        gpu: its data sheet.
        ranks: number of GPUs.
        link_efficiency: share of a link's bandwidth that collectives reach.
        name: printed name.
    """
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


@dataclass(frozen=True)
class ClusterOptions:
    """Hold the options of tools/plan.py that describe a cluster.

    Attributes:
        ranks: number of GPUs.
        gpu: a known GPU, or None.
        numbers: fields of Cluster given by hand (memory, peak, memory_bandwidth, intra, inter,
            gpus_per_node). They replace those of the data sheet and of a measurement.
        link_efficiency: share of a link's bandwidth that collectives reach.
        latency: seconds of the smallest collective.
        framework: bytes of a rank that no tensor uses.
    """

    ranks: int
    gpu: str | None
    numbers: Mapping[str, Any]
    link_efficiency: float = LINK_EFFICIENCY
    latency: float = LATENCY
    framework: float = FRAMEWORK_BYTES


# Numbers that must be given by hand for a GPU without a data sheet.
_NEEDED_NUMBERS = ("memory", "peak", "memory_bandwidth", "intra", "inter")


def resolve_cluster(options: ClusterOptions, measured: Cluster | None = None) -> Cluster:
    """Return the cluster that the options describe.

    Args:
        options: a data sheet and numbers by hand.
        measured: the machine of a calibration. Its bandwidths and latency replace those of the
            data sheet.

    Raises:
        ConfigError: if the GPU is not known, or a number is missing.
    """
    if measured is not None:
        return _calibrated_cluster(options, measured)
    fixed = {
        "ranks": options.ranks,
        "latency": options.latency,
        "framework": options.framework,
    }
    if options.gpu is not None:
        sheet = cluster_of(
            known_gpu(options.gpu), options.ranks, link_efficiency=options.link_efficiency
        )
        return replace(sheet, **{**options.numbers, **fixed}, name=options.gpu)
    missing = [name for name in _NEEDED_NUMBERS if name not in options.numbers]
    if missing:
        raise ConfigError(
            f"say which --gpu ({', '.join(GPUS)}), or give --calibration, or all of its numbers by "
            f"hand (missing: {missing[0]})"
        )
    return Cluster(**{"gpus_per_node": 8, **options.numbers, **fixed}, name="GPU")


def _calibrated_cluster(options: ClusterOptions, measured: Cluster) -> Cluster:
    base = measured
    if options.gpu is not None:
        sheet = cluster_of(
            known_gpu(options.gpu),
            options.ranks,
            link_efficiency=options.link_efficiency,
            name=options.gpu,
        )
        base = replace(
            sheet,
            device=measured.device,
            memory_bandwidth=measured.memory_bandwidth,
            measured_row_bandwidth=measured.measured_row_bandwidth,
            intra=measured.intra,
        )
    fixed = {
        "ranks": options.ranks,
        "framework": 0.0 if base.device == "cpu" else options.framework,
        "latency": measured.latency or options.latency,
    }
    return replace(base, **{**options.numbers, **fixed})
