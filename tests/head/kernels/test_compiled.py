"""The kernels as a GPU would run them, compiled without one: that they compile, and where their barriers stand.

The interpreter runs one thread at a time and cannot show a missing barrier; the compiled code shows where they are.
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

# In a process of its own: triton is imported either to compile or to interpret.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_kd.head import triton_kernels

INTEGERS = ("width", "tiles", "valid", "count", "stride", "size", "chosen_tiles", "gradient_width")
POINTERS = {"columns": "*i64", "label": "*i64", "chosen": "*i32", "found_columns": "*i32"}


def build(name, narrow, **constants):
    own = constants.get("PER_ROW", False)
    kernel = getattr(triton_kernels, name)
    types = {"temperature": "fp32", **dict.fromkeys(INTEGERS, "i32"), **POINTERS, **dict.fromkeys(constants, "constexpr")}
    if own:
        types["temperature"] = "*fp32"
    if narrow:
        types["gradient"] = "*bf16"
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    aligned = [n for n, a in enumerate(kernel.arg_names) if signature[a][0] == "*" or a in ("width", "gradient_width")]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs={(n,): [["tt.divisibility", 16]] for n in aligned})
    options = {"num_warps": 8, "enable_fp_fusion": True}
    title = "== " + name + " " + str(narrow) + (" own" if own else "")
    print(title, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"], sep="\\n")


for own in (False, True):
    flags = dict(HAS_TEMPERATURE=True, PER_ROW=own)
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
    """Name of the kernel and whether its gradient is narrow -> its code for compute capability 9.0."""
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
    """Loads from and stores to memory, and barriers, in the order of the code; runs of the same step are one."""
    found = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", compiled()[name])
    return [step for n, step in enumerate(found) if n == 0 or step != found[n - 1]]


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
        "gradient_kernel False own",
        "gradient_kernel True own",
    ],
)
def test_logits_are_read_before_a_gradient_is_stored_over_them(name: str) -> None:
    """In the loop, in its last part, before the label and before the ids."""
    load, store, barrier = "ld.global", "st.global", "bar.sync"
    assert steps(name) == [load, barrier, store] * 2 + [barrier, store, barrier, load, store]


@pytest.mark.parametrize("name", ["split_kernel False", "split_kernel False own"])
def test_the_support_is_lifted_out_between_barriers(name: str) -> None:
    """Read it; barrier; overwrite it; barrier; read its tiles; barrier; merge."""
    found = "".join(
        {"ld.global": "L", "st.global": "S", "bar.sync": "b"}[step] for step in steps(name)
    )
    # Barriers inside the last two parts are those of sums over a row.
    assert re.fullmatch(r"(LS)+bLSbL(bS)+bL(bL)*[bSL]*S", found), found
