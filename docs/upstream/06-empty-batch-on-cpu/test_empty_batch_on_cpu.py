"""An expert that gets no tokens must not end the process. Each product runs in a process of its own, since one that fails takes it along."""

import subprocess
import sys
import textwrap

import pytest
import torch

import bitsandbytes as bnb

needs_native_kernel = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the kernel in question runs on CPUs with AVX512-BF16")


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


@needs_native_kernel
@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 128)], ids=str)
def test_a_layer_in_eval_mode_takes_an_empty_batch(shape):
    done = run(f"""
        import torch, bitsandbytes as bnb
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer = bnb.nn.LinearNF4(128, 64, compute_dtype=dtype).to("cpu").eval()
            with torch.no_grad():
                layer(torch.zeros(1, 128, dtype=dtype))
                y = layer(torch.empty({shape}, dtype=dtype))
            print(tuple(y.shape), y.dtype)
    """)
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    for line, dtype in zip(done.stdout.splitlines(), ("bfloat16", "float16", "float32")):
        assert line == f"{(*shape[:-1], 64)} torch.{dtype}"


@needs_native_kernel
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_operator_takes_an_empty_batch(quant_type):
    done = run(f"""
        import torch, bitsandbytes.functional as F
        B, state = F.quantize_4bit(torch.randn(64, 128), quant_type="{quant_type}")
        B, state = F._convert_weight_packed_for_cpu(B, state)
        print(tuple(F.gemv_4bit(torch.empty(0, 128, dtype=torch.bfloat16), B, state=state).shape))
    """)
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.startswith("(0, 64)")


def test_an_empty_batch_trains():
    layer = bnb.nn.LinearNF4(128, 64).to("cpu").train()
    x = torch.empty(0, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 128)
