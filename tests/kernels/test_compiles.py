"""Every Triton kernel compiles for a GPU that is not there: front end, optimiser and assembler run without one.

The interpreter runs kernels as Python and takes what the compiler would refuse.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.house import CHECKOUT
from tests.kernels.cases import HAS_TRITON

COMPILE = """
import sys
import tests.kernels.conftest
import os
os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lm_envs.kernels import logprob_kl_triton as rows, logprob_kl_triton_linear as tiles

POINTERS = {"z": 0, "r": 0, "dz": 0, "hidden": 0, "weight": 0, "ref_hidden": 0, "ref_weight": 0}
SUMS = {"stats": 0, "partial": 0, "coefficients": 0}


def check(kernel, dtype, constants, warps):
    function = kernel.fn if hasattr(kernel, "configs") else kernel
    types = {name: "*" + dtype for name in POINTERS}
    types |= {name: "*fp64" if dtype == "fp64" else "*fp32" for name in SUMS} | {"ids": "*i64", "keep": "*i1"}
    types |= {name: "fp32" for name in ("inv_t_high", "inv_t_low", "cap_high", "cap_low")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names
    }
    known = {(i,): constants[name] for i, name in enumerate(function.arg_names) if name in constants}
    source = ASTSource(fn=function, signature=signature, constexprs=known, attrs={})
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert "st.global" in ptx
    print(function.__name__)


dtype, two, cap = sys.argv[1], sys.argv[2] == "two", sys.argv[3] == "cap"
common = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "SOFTCAP": cap}
by_row = common | {"MASKED": not cap}
strides = {"z_stride": 1, "r_stride": 1} if two else {}
block = strides | {"STRIDED": not two, "BLOCK": 2048}
for parts in (1, 4):
    check(rows._forward_kernel, dtype, by_row | block | {"TWO": two, "SPLIT": parts}, 8)
check(rows._combine_kernel, dtype, by_row | strides | {"TWO": two, "SPLIT": 4}, 4)
check(rows._backward_kernel, dtype, by_row | block | {"TWO": two}, 8)
check(rows._precise_kernel, dtype, by_row | block, 8)
tile = {"h_col": 1, "w_col": 1, "s_col": 1, "q_col": 1, "ROWS": 64, "COLS": 64, "DEPTH": 32, "PARTS": 2}
check(tiles._forward_kernel, dtype, common | tile | {"TWO": two, "LIFT": False}, 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not there")
@pytest.mark.parametrize(
    ("dtype", "two", "cap"), [("bf16", "two", ""), ("bf16", "", "cap"), ("fp32", "two", "cap"), ("fp64", "two", "")]
)
def test_for_cuda(tmp_path, dtype, two, cap):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{CHECKOUT}:{environment.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, dtype, two, cap]
    run = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 6
