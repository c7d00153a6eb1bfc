"""The Triton kernels on a machine without a GPU: run by Triton's interpreter, and compiled for an H100."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# Compiles the kernels for an H100: the norm of 384 channels in 32 groups of bf16, the sum of 256.
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ddpm.kernels import fused
import torch
x, stripe = torch.empty(1, 384, 32, 32), dict(C=256, COLUMNS=fused.COLUMNS, ROWS=fused.PIXELS, STRIPE=fused.STRIPE)
types = dict(
    keys="*i32", means="*fp32", scales="*fp32", sums="*fp32", N="i32", eps="fp32", dropped="i32",
    size="i64", pixels="i32", key="i32", row_stride="i32",
)
for kernel, shape in (
    (fused._activate, fused._divide(x, 32, True, fused.PIXELS)[1]),
    (fused._differentiate, fused._divide(x, 32, True, fused.PIXELS_BACK)[1]),
    (fused._differentiate, fused._divide(x, 32, False, fused.PIXELS_BACK)[1]),
    (fused._add_branch, dict(C=256, BLOCK=fused.BLOCK)),
    (fused._sum_stripe, stripe),
):
    signature = {name: "constexpr" if name in shape else types.get(name, "*bf16") for name in kernel.arg_names}
    compile(ASTSource(fn=kernel, signature=signature, constexprs=shape), target=GPUTarget("cuda", 90, 32))
"""


def run_python(*arguments, **environment):
    how = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([sys.executable, *arguments], **how)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_equal_float64():
    words = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    file = Path(__file__).with_name("interpreted.py")
    run_python(*words, file, TRITON_INTERPRET="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


@pytest.mark.device
def test_kernels_compile_for_a_gpu(tmp_path):
    run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
