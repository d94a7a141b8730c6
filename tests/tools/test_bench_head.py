"""tools/bench_head.py on tiny inputs: only right gradients are timed, and failures are named."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_kd.losses import reference_kd_cross_entropy
from megatron_kd.targets import SparseTarget, TopSelection, select_targets
from tests.losses.cases import fresh_seed, relative_error, say

TOOLS = Path(__file__).parents[2] / "tools"
TINY = [
    "--device",
    "cpu",
    "--tokens",
    "64",
    "--hidden",
    "32",
    "--vocab",
    "512",
    "--top-k",
    "8",
    "--rounds",
    "1",
]
# The program, what it imports, and the list of its variants.
PROGRAMS = ("bench", "bench_head", "bench_peers")
PLAIN = [
    "megatron-fused-ce",
    "megatron-top-k",
    "torch-ce",
    "torch-top-k",
    "torch-kl",
    "torch-targets",
]


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    """Import the program on one thread, without torch.compile, which megatron-core's loss uses."""
    sys.path.insert(0, str(TOOLS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield importlib.import_module("bench_head")
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)
    sys.path.remove(str(TOOLS))
    for name in [name for name in sys.modules if name.split(".")[0] in PROGRAMS]:
        del sys.modules[name]


def own_names(bench: ModuleType) -> list[str]:
    return [variant.name for variant in bench.VARIANTS if variant.internal]


def variants_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variant["name"]: variant for variant in result["variants"]}


def use(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Leave the benchmark only the variant `name`, with `changes`."""
    (variant,) = (variant for variant in bench.VARIANTS if variant.name == name)
    registry = importlib.import_module("bench.head_registry")
    monkeypatch.setattr(registry, "VARIANTS", [replace(variant, **changes)])


def test_help(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(option in text for option in ("--near", "--only", "--teacher-hidden", "--output"))
    with pytest.raises(SystemExit) as end:
        bench.main(["--only", "torch-ce,nonsense"])
    assert end.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def check_variant(
    seed: int, name: str, variant: dict[str, Any], table: str, baseline_seconds: float
) -> None:
    """Check state, times, memory, errors and the table line of one variant."""
    assert variant["status"] == "measured", say(seed, name, variant)
    assert (
        0 < variant["seconds"]["min"] <= variant["seconds"]["median"] <= variant["seconds"]["max"]
    )
    assert variant["ratio"]["torch-ce"]["median"] > 0
    assert variant["ratio"]["megatron-fused-ce"]["median"] > 0
    assert variant["peak_bytes"] > 64 * 512 * 4 // 8, say(seed, name, variant)
    assert (
        any(name in line and "e-0" in line for line in table.splitlines())
        or name == "teacher-product"
    )
    # A distance alone is ill-conditioned so close to the teacher. The gradient of everything
    # else is as large as the loss's.
    limit = (
        3e-4
        if variant["computes"] in ("KL", "JSD")
        else 5e-6
        if variant["own"] or name.startswith("torch")
        else 5e-3
    )
    assert max(variant["error"].values(), default=0.0) < limit, say(seed, name, variant)
    assert variant["ratio"]["torch-ce"]["median"] == variant["seconds"]["median"] / baseline_seconds


def test_every_own_variant_is_right_and_timed(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, file = fresh_seed(), tmp_path / "head.json"
    only = [
        "--only",
        ",".join([*own_names(bench), *PLAIN]),
        "--output",
        str(file),
        "--seed",
        str(seed),
    ]
    assert bench.main([*TINY, *only]) == 0, say(seed, capsys.readouterr().out)
    table, result = capsys.readouterr().out, json.loads(file.read_text())
    assert {"commit", "device", "threads", "versions", "options", "variants"} <= result.keys()
    assert result["versions"]["torch"] == torch.__version__
    assert result["options"]["near"] == 0.02
    variants = variants_of(result)
    assert variants.keys() == {*own_names(bench), *PLAIN}
    baseline_seconds = variants["torch-ce"]["seconds"]["median"]
    for name, variant in variants.items():
        check_variant(seed, name, variant, table, baseline_seconds)
    assert (
        variants["torch-ce"]["peak_bytes"] > 2 * 64 * 512 * 4
    )  # two tensors of logits' size at the least


@pytest.mark.parametrize(("hidden", "teacher_hidden"), [(24, 40), (40, 24)])
def test_widths_may_differ_and_gradients_are_compared_in_part(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hidden: int,
    teacher_hidden: int,
) -> None:
    """The student stays near the teacher; chunks and partly checked gradients work."""
    seed = fresh_seed()
    reference = importlib.import_module("bench.head_reference")
    for name, value in (("CHUNK", 10 * 512), ("CHECKED_TOKENS", 20), ("CHECKED_ROWS", 60)):
        monkeypatch.setattr(reference, name, value)
    sizes = [
        *TINY,
        "--hidden",
        str(hidden),
        "--teacher-hidden",
        str(teacher_hidden),
        "--near",
        "0.1",
        "--seed",
        str(seed),
    ]
    assert bench.main([*sizes, "--json", "--only", "head-chunk,online,torch-kl,targets"]) == 0
    variants = variants_of(json.loads(capsys.readouterr().out))
    assert {variant["status"] for variant in variants.values()} == {"measured"}, say(seed, variants)
    inputs = reference.make_inputs(bench.parse_arguments(sizes))
    difference = inputs.teacher_logits() - inputs.hidden @ inputs.weight.T
    assert 0.08 < difference.std() < 0.12, say(seed, difference.std())
    assert 4.0 < inputs.teacher_logits().std() < 5.6, say(seed, difference.std())


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_gradient_gets_no_time(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
) -> None:
    runs = []

    def make(device: torch.device) -> Callable[..., Any]:
        def call(inputs: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            return factor * F.cross_entropy(hidden @ weight.T, inputs.labels)

        return call

    use(bench, monkeypatch, "torch-ce", make=make, internal=True)
    assert bench.main([*TINY, "--seed", str(fresh_seed())]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("torch-ce"))
    assert "wrong gradient: error " in line
    assert "limit 1.0e-04" in line
    assert ".." not in line
    assert len(runs) == 1
    use(bench, monkeypatch, "torch-ce", make=make, internal=False)
    assert bench.main([*TINY, "--json"]) == 0  # another library's mistake is not this project's
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    assert variant["status"] == "wrong gradient"
    assert variant["seconds"] is None
    assert variant["ratio"] == {}


def test_limits(bench: ModuleType) -> None:
    """The limit grows for a distance alone near the teacher, where fp32 rounding weighs more."""
    variants = {variant.name: variant for variant in bench.VARIANTS}
    assert (
        variants["head-chunk"].limit("fp32", 1e-3)
        == variants["torch-kl"].limit("fp32", 1.0)
        == 1e-4
    )
    assert (
        variants["head-chunk"].limit("bf16", 0.02)
        == variants["dense-kl"].limit("bf16", 0.02)
        == 2e-2
    )
    assert (
        1e-4
        < variants["dense-kl"].limit("fp32", 0.02)
        < 5e-4
        < variants["dense-kl"].limit("fp32", 1e-3)
    )


def test_wrong_weight_rows_and_wrong_targets_are_detected(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong gradient of the weight alone; a top-k that misses the last kept entry."""
    seed = fresh_seed()

    def scaled(device: torch.device) -> Callable[..., Any]:
        return lambda inputs, hidden, weight: F.cross_entropy(
            hidden @ (1.01 * weight - 0.01 * weight.detach()).T, inputs.labels
        )

    def short(device: torch.device) -> Callable[..., Any]:
        def call(inputs: Any, hidden: torch.Tensor, weight: torch.Tensor) -> SparseTarget:
            target = select_targets(inputs.teacher_logits(), TopSelection(inputs.top_k))
            target.logprobs[:, -1] = target.logprobs[:, -2]
            return target

        return call

    for name, make in (("torch-ce", scaled), ("targets", short)):
        use(bench, monkeypatch, name, make=make)
        bench.main([*TINY, "--seed", str(seed), "--json"])
        (variant,) = json.loads(capsys.readouterr().out)["variants"]
        assert variant["status"] == "wrong gradient", say(seed, variant)


def test_bf16_logits_are_distinguished_from_fp32_logits(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Near the teacher rounding destroys a distance's gradient; further away it is timed."""
    seed = fresh_seed()
    status = {}
    for near in ("0.02", "2.0"):
        bench.main(
            [
                *TINY,
                "--dtype",
                "bf16",
                "--near",
                near,
                "--only",
                "torch-kl,head-chunk,given-logits",
                "--json",
                "--seed",
                str(seed),
            ]
        )
        variants = variants_of(json.loads(capsys.readouterr().out))
        status[near] = variants["torch-kl"]["status"]
        assert (
            variants["head-chunk"]["status"] == variants["given-logits"]["status"] == "measured"
        ), say(seed, variants)
        assert (
            max(variants["head-chunk"]["error"].values())
            < 5e-3
            < max(variants["given-logits"]["error"].values())
        ), say(seed, variants)
    assert status == {"0.02": "wrong gradient", "2.0": "measured"}, say(seed, status)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": "no_such_library"}, "not installed"),
        ({"needs_cuda": True}, "needs CUDA"),
        (
            {"make": lambda device: importlib.import_module("megatron_kd.nowhere")},
            "cannot be imported: No module named",
        ),
        (
            {
                "make": lambda device: (
                    lambda *_: (_ for _ in ()).throw(RuntimeError("first\nsecond line"))
                )
            },
            "failed: RuntimeError: first",
        ),
        (
            {"make": lambda device: lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("x"))},
            "out of memory",
        ),
    ],
)
def test_a_variant_that_cannot_run_is_named_with_the_reason(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    use(bench, monkeypatch, "torch-ce", **changes)
    assert bench.main(TINY) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("torch-ce"))
    assert words in line
    assert "second line" not in out


def test_peers_are_listed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    peers = importlib.import_module("bench_peers")
    assert peers.main(["--device", "cpu"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {variant.name for variant in bench.VARIANTS}
    assert all(lines[name].endswith("runs") for name in own_names(bench))


def test_the_reference_losses(bench: ModuleType) -> None:
    """They equal the project's reference and torch's divergences."""
    seed = fresh_seed()
    z, t = (3.0 * torch.randn(7, 50, dtype=torch.float64) for _ in range(2))
    labels, alpha = torch.randint(0, 50, (7,)), 0.3
    target = select_targets(t, TopSelection(6))
    log_p, log_q = z.log_softmax(1), t.log_softmax(1)
    kept = t.topk(6, dim=1)
    middle = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()

    def kl(to: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(1)

    ce, jsd = (
        F.nll_loss(log_p, labels, reduction="none"),
        0.5 * kl(middle, log_p) + 0.5 * kl(middle, log_q),
    )
    cosine = 1 - (z / z.norm(dim=1, keepdim=True) * t / t.norm(dim=1, keepdim=True)).sum(1)
    expected = {
        "CE": ce,
        "CE + KL(top-k || p)": reference_kd_cross_entropy(z, labels, target, alpha=alpha).total,
        "KL": kl(log_p, log_q),
        "JSD": jsd,
        "CE + JSD": (1 - alpha) * ce + alpha * jsd,
        "CE + cosine": (1 - alpha) * ce + alpha * cosine,
        "KL within top-k": kl(z.gather(1, kept.indices).log_softmax(1), kept.values.log_softmax(1)),
    }
    names = {variant.computes for variant in bench.VARIANTS} - set(bench.NO_GRADIENT)
    assert names == expected.keys()
    reference = importlib.import_module("bench.head_reference")
    teacher = reference.TeacherChunk(t, labels, target)
    for name, loss in expected.items():
        assert relative_error(reference.token_loss(name, z, teacher, alpha), loss) < 1e-12, say(
            seed, name
        )
