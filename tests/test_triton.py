"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled for GPUs that are not here.

The interpreter must be chosen before Triton is imported, and then holds for the whole process. So the tests of ``interpreted`` run in processes of
their own.
"""

from itertools import product
import os
from pathlib import Path
import re
import subprocess
import sys

from helpers import run_python
import pytest
import torch

if sys.platform != "linux":
    pytest.skip("there is no Triton but for Linux", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction, mangle_type

from bitsandbytes import _ops
from bitsandbytes.backends.triton import blockwise, int8, ops, optimizers, products

FAMILIES = {"blockwise": blockwise, "products": products, "int8": int8, "optimizers": optimizers}
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The tests of every family as a running process, and the file that receives what it says."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # small tensors, and the processes run side by side
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    folder, running = tmp_path_factory.mktemp("interpreted"), {}
    for family in FAMILIES:
        with open(folder / family, "w") as said:
            tests = Path(__file__).parent / "interpreted" / f"{family}_in_triton.py"
            process = subprocess.Popen([*pytest_quietly, str(tests)], stdout=said, stderr=subprocess.STDOUT, env=environment)
        running[family] = process, folder / family
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_in_the_interpreter(family, interpreted):
    process, said = interpreted[family]
    status = process.wait(timeout=600)
    assert status == 0 and re.search(r"^\d+ passed in ", said.read_text(), re.MULTILINE), said.read_text()[-8000:]


# ------------------------------------------------------------------------------------------------------------------------- compiling
CODE, SCALES = torch.linspace(-1, 1, 256), torch.ones(64)
BYTES, INT8 = torch.zeros(64 * 65, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.int8)
NESTED = (BYTES[:65], CODE, torch.ones(1))


def launch_blockwise():
    x = torch.randn(1024).bfloat16()
    for quant_type in ("nf4", "fp4"):
        blockwise.quantize_4bit(x, 64, quant_type, torch.uint8)
    for blocksize in (1, 256, 10_000):
        blockwise.quantize_blockwise(x[:1].repeat(20 * blocksize), CODE, blocksize)
    blockwise.dequantize_4bit(BYTES, SCALES, 64, "nf4", (1000,), torch.bfloat16)
    blockwise.dequantize_blockwise(BYTES[:1], SCALES, CODE, 64, torch.float16)
    blockwise.dequantize_blockwise(BYTES[:1000], SCALES, CODE, 64, torch.float16)


def launch_products():
    for dtype, M, K, nested in ((torch.bfloat16, 1, 64, NESTED), (torch.float16, 20, 65, ()), (torch.float32, 40, 64, ()), (torch.float16, 2, 1, ())):
        A, grad = torch.randn(M, K).to(dtype), torch.randn(M, 64).to(dtype)
        products.gemm_4bit(A, BYTES, (64, K), torch.ones(65), 64, "nf4", grad[0], *nested)
        products.gemm_4bit_backward(grad, BYTES, (64, K), torch.ones(65), 64, "nf4", *nested)
    products.int8_linear_backward(torch.randn(64, 64).bfloat16(), INT8, SCALES)


def launch_int8():
    A = torch.randn(64, 64).bfloat16()
    int8.int8_double_quant(A, 2.0)
    int8.int8_linear(A, INT8, SCALES, None, 2.0)
    int8.int8_linear_matmul(INT8[:, :1], INT8[:1, :1])
    int8.int8_mixed_scaled_mm(A, INT8, INT8, SCALES, SCALES, torch.tensor([1, 2]))
    int8.int8_mm_dequant(INT8.int(), SCALES, SCALES)


def launch_optimizers():
    cases = ("adam", 2), ("adam", 3), ("ademamix", 3), ("momentum", 1), ("lion", 1), ("rmsprop", 3), ("adagrad", 1), ("lamb", 2)
    for i, (algorithm, count) in enumerate(cases):
        p = torch.randn(1024).to((torch.bfloat16, torch.float16)[i % 2])
        in_8bit = algorithm in ("ademamix", "lamb")  # takes ten times as long
        moments = [torch.zeros(1024, dtype=torch.uint8 if in_8bit else torch.float32) for _ in range(count)]
        absmax, qmaps = ([torch.zeros(4) for _ in range(count)], [CODE] * count) if in_8bit else ([], [])
        optimizers.optimizer_step(
            [p], [p], moments, absmax, qmaps, [torch.zeros(1)], algorithm, 5, 1e-3, 0.9, 0.99, 0.999, 4.0, 1e-8, 0.01,
            max_unorm=float(algorithm == "lamb"), amsgrad=(algorithm, count) == ("adam", 3), centered=algorithm == "rmsprop", skip_zeros=bool(i % 2),
            seeds=[5],
        )  # fmt: skip


def compile_for(target, kernel, args, meta):
    """What a launch with these arguments compiles: it makes use of a size that is one, and of sizes and addresses that 16 divides."""
    constants = {name: value for name, value in meta.items() if name in kernel.arg_names}
    signature = dict(zip(kernel.arg_names, map(mangle_type, args))) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names
    attributes = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if name in (kernel.do_not_specialize or ()) or isinstance(number, float):
            continue
        if number == 1:
            signature[name], constants[name] = "constexpr", 1
        elif number % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in meta.items() if name not in constants}
    return compile_kernel(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


@pytest.fixture
def compiled(request, monkeypatch, tmp_path):
    """Fills with kernels that are compiled for a target in the place of being launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = []

    def compile_instead(kernel, grid):
        return lambda *args, **meta: kernels.append(compile_for(TARGETS[request.param], kernel, args, meta))

    monkeypatch.setattr(JITFunction, "__getitem__", compile_instead)
    return kernels


SHARED_MEMORY = 64 * 1024  # of a program, where there is least

COMPILED = [*product(FAMILIES, ["sm_80", "sm_90"]), ("products", "gfx942"), ("int8", "gfx942")]


@pytest.mark.parametrize(("family", "compiled"), COMPILED, indirect=["compiled"])
def test_kernels_compile_with_the_arithmetic_they_ask_for(family, compiled):
    globals()[f"launch_{family}"]()
    assert len(compiled) >= 6
    for kernel in compiled:  # an instruction that says .rn is rounded to the nearest and, PTX promises, never fused with another
        ptx = kernel.asm.get("ptx", "")
        loose = re.findall(r"\b(?:add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt)\.(?!rn\.f32|[su]\d|lo|hi|wide|cc)[a-z.0-9]*", ptx)
        assert not loose, f"{kernel.metadata.name}: {set(loose)}"
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name


# ---------------------------------------------------------------------------------------------------------------------- registration
def test_every_operator_has_a_kernel():
    assert set(ops.OPERATORS) == set(_ops._CHECKS)


@pytest.mark.parametrize(
    ("pretence", "key"), [("torch.cuda.device_count = lambda: 1", "CUDA"), ("torch.xpu.is_available = lambda: True", "XPU")], ids=["cuda", "xpu"]
)
def test_a_gpu_without_a_native_build_gets_the_kernels(pretence, key):
    program = f"""
import torch
{pretence}
import bitsandbytes
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
assert all(has_kernel("bitsandbytes::" + name, {key!r}) for name in bitsandbytes._ops._CHECKS)
assert not torch.cuda.is_initialized()
"""
    finished = run_python(program)
    assert finished.returncode == 0, finished.stderr


def test_importing_the_library_leaves_triton_alone():
    program = """
import sys, torch, bitsandbytes
assert "triton" not in sys.modules
assert not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemm_4bit", "CUDA")
"""
    finished = run_python(program)
    assert finished.returncode == 0 and not finished.stderr


def test_without_triton_xpus_have_the_reference():
    program = """
import sys
sys.modules["triton"] = None
import torch, bitsandbytes
from bitsandbytes.backends.xpu import ops
assert not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemm_4bit", "XPU")
"""
    finished = run_python(program)
    assert finished.returncode == 0 and not finished.stderr
