"""Compile the kernels for a GPU without one, and check where their barriers stand.

The interpreter runs one thread at a time and cannot show a missing barrier; the compiled code can.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from tempfile import TemporaryDirectory

import pytest

# Runs in a separate process: triton is imported either to compile or to interpret.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_kd.head import triton_kernels

INTEGERS = ("width", "tiles", "valid", "count", "stride", "size", "num_tiles", "gradient_width")
POINTERS = {"columns": "*i64", "label": "*i64", "tile_ids": "*i32", "top_columns": "*i32"}
ALIGNED = ("width", "gradient_width")


def build(name, narrow, **constants):
    per_row = constants.get("PER_ROW", False)
    kernel = getattr(triton_kernels, name)
    types = {"temperature": "fp32", **dict.fromkeys(INTEGERS, "i32"), **POINTERS}
    types |= dict.fromkeys(constants, "constexpr")
    if per_row:
        types["temperature"] = "*fp32"
    if narrow:
        types["gradient"] = "*bf16"
    names = kernel.arg_names
    signature = {argument: types.get(argument, "*fp32") for argument in names}
    values = {(names.index(argument),): value for argument, value in constants.items()}
    aligned = [
        number
        for number, argument in enumerate(names)
        if signature[argument][0] == "*" or argument in ALIGNED
    ]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=values,
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    options = {"num_warps": 8, "enable_fp_fusion": True}
    title = "== " + name + " " + str(narrow) + (" per row" if per_row else "")
    target = GPUTarget("cuda", 90, 32)
    print(title, triton.compile(source, target=target, options=options).asm["ptx"], sep="\\n")


for per_row in (False, True):
    flags = dict(HAS_TEMPERATURE=True, PER_ROW=per_row)
    build("tile_kernel", False, TOTAL=True, ENTROPY=True, TILES=128, **flags)
    build("split_kernel", False, TOTAL=True, ENTROPY=True, IDS=64, TILES=1024, **flags)
    for narrow in (False, True):
        build("gradient_kernel", narrow, HAS_CONSTANT=True, IDS=64, BLOCK=4096, **flags)
build("select_kernel", False, BY_TILE=False, BLOCK=4096)
build("select_kernel", True, BY_TILE=True, BLOCK=2048)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="this triton was built without NVIDIA's compiler",
)


@functools.cache
def compiled() -> dict[str, str]:
    """Return the code for compute capability 9.0 by the kernel's name and variant."""
    with TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        run = subprocess.run(
            [sys.executable, "-c", COMPILE],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    assert run.returncode == 0, run.stderr[-4000:]
    parts = re.split(r"^== (.*)$", run.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def steps(name: str) -> list[str]:
    """Return loads, stores and barriers in the order of the code.

    Runs of the same step are one.
    """
    instructions = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", compiled()[name])
    return [step for n, step in enumerate(instructions) if n == 0 or step != instructions[n - 1]]


def test_every_kernel_compiles() -> None:
    assert sorted({name.split()[0] for name in compiled()}) == [
        "gradient_kernel",
        "select_kernel",
        "split_kernel",
        "tile_kernel",
    ]
    for name, code in compiled().items():
        assert ".local" not in code or "select" in name, f"{name} spills registers"
    for name in ("tile_kernel False", "gradient_kernel False", "gradient_kernel True"):
        assert "ld.global.v4" in compiled()[name], f"{name} does not load 16 bytes at a time"


@pytest.mark.parametrize(
    "name",
    [
        "gradient_kernel False",
        "gradient_kernel True",
        "gradient_kernel False per row",
        "gradient_kernel True per row",
    ],
)
def test_logits_are_read_before_a_gradient_is_stored_over_them(name: str) -> None:
    """Check the loop, its last part, and the stores of the label and of the ids."""
    load, store, barrier = "ld.global", "st.global", "bar.sync"
    assert steps(name) == [load, barrier, store] * 2 + [barrier, store, barrier, load, store]


@pytest.mark.parametrize("name", ["split_kernel False", "split_kernel False per row"])
def test_the_support_is_extracted_between_barriers(name: str) -> None:
    """Expect: read it; barrier; overwrite it; barrier; read its tiles; barrier; merge."""
    code = "".join(
        {"ld.global": "L", "st.global": "S", "bar.sync": "b"}[step] for step in steps(name)
    )
    # Barriers inside the last two parts are those of sums over a row.
    assert re.fullmatch(r"(LS)+bLSbL(bS)+bL(bL)*[bSL]*S", code), code
