"""Triton's kernels by columns, compiled for GPUs that need not be there; what they compute, the interpreter tests."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

SCRIPT = """
import sys

import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titan_adam_mini.kernels import triton_columns, triton_kernels

TENSORS = {"rows": "*i64", "programs": "*i32", "scalars": "*fp32", "hyper": "*fp64"}
TYPES = {"P": tl.bfloat16, "G": tl.bfloat16, "ROUND": True, "BY_COLUMNS": True, "NARROW": False, "TILE": 2048}
KERNELS = [
    *((triton_columns.column_sums, {"G": tl.float32, "UNIT": unit}) for unit in (0, 1)),
    (triton_columns.column_moments, {}),
    (triton_columns.whole_moments, {}),
    (triton_columns.row_moments, {}),
    *((triton_kernels.update_lines, {**TYPES, "M": kind, "UNIT": 1}) for kind in (tl.bfloat16, tl.int8)),
]
for kernel, constants in KERNELS:
    names = kernel.arg_names
    signature = {name: TENSORS.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    assert compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": False}).asm["cubin"]
print(len(KERNELS), "compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_they_compile(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, capability], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "7 compiled\n", done.stderr
