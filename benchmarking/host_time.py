"""How long the host takes for one call of a 4-bit layer: from ``forward`` until its kernel is launched.

    python benchmarking/host_time.py

On a GPU calls are launched faster than they run, in bursts that its queue has room for, so that the time of a burst is the host's. The script uses
nothing but the published interface: run by an interpreter with another library it measures that one. Without a GPU this project's path for CUDA is
measured with tensors of the host and, in place of the kernels, C functions that return at once; nothing but the driver's launch is missing then.

Figures are microseconds a call: the least of many bursts, since whatever else the machine does only adds to it. ``torch.nn.Linear`` of the same shape
is there for comparison on a GPU; without one it would compute.
"""

import argparse
import ctypes
import functools
from pathlib import Path
import subprocess
import tempfile
import time

import torch

import bitsandbytes as bnb

FEATURES = 4096
BURST, BURSTS = 200, 50
ROW = "{:>6} {:>7} {:>10} {:>9} {:>9}"


class NoKernels:
    """A library whose functions have nothing to do."""

    SOURCE = """
        int bnb_cuda_gemm_4bit() { return 0; }
        int bnb_cuda_gemm_4bit_backward() { return 0; }
        int bnb_cuda_capability() { return 90; }
    """

    def __init__(self, folder: Path):
        source, library = folder / "nothing.c", folder / "libnothing.so"
        source.write_text(self.SOURCE)
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", str(source), "-o", str(library)], check=True)
        self._lib = ctypes.CDLL(str(library))
        self.bnb_cuda_capability = self._lib.bnb_cuda_capability


def use_no_kernels() -> None:
    """Lets layers on the CPU take the way of those on a GPU, to functions that return at once."""
    from bitsandbytes import _ops
    from bitsandbytes.backends.cuda import gemm, native

    with tempfile.TemporaryDirectory() as folder:
        library = NoKernels(Path(folder))
    native.use_library(library, lambda tensor: (0, tensor.device.index))
    for name in ("gemm_4bit", "gemm_4bit_backward"):
        _ops._NATIVE[name, "cpu"] = (_ops._CHECKS[name], getattr(gemm, name))


def microseconds(call, device: str) -> float:
    """The least mean of a burst of calls."""
    best = float("inf")
    for _ in range(BURSTS):
        begin = time.perf_counter()
        for _ in range(BURST):
            call()
        best = min(best, (time.perf_counter() - begin) / BURST * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return best


def layers(device: str):
    """Names and layers."""
    for nested in (False, True):
        layer = bnb.nn.Linear4bit(FEATURES, FEATURES, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4")
        yield ("nested" if nested else "plain"), layer.to(device)
    if device == "cuda":
        yield "dense", torch.nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16, device=device)


def times(layer, x: torch.Tensor, device: str) -> list[float]:
    """Of a forward pass in inference and in training, and of the backward pass."""
    trained = x.clone().requires_grad_()
    with torch.inference_mode():
        inference = microseconds(functools.partial(layer, x), device)
    training = microseconds(functools.partial(layer, trained), device)
    result = layer(trained)
    gradient = functools.partial(torch.autograd.grad, result, trained, torch.ones_like(result), retain_graph=True)
    return [inference, training, microseconds(gradient, device)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = [(name, layer.requires_grad_(False)) for name, layer in layers(device)]
    for _, layer in measured:
        layer(torch.ones(1, FEATURES, dtype=torch.bfloat16, device=device))
    if device == "cpu":
        use_no_kernels()
    print(f"bitsandbytes {bnb.__version__}, PyTorch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'no GPU'}")
    print(ROW.format("tokens", "weight", "inference", "training", "backward"))
    for tokens in (1, 16):
        x = torch.randn(tokens, FEATURES, dtype=torch.bfloat16, device=device)
        for name, layer in measured:
            print(ROW.format(tokens, name, *(f"{time:.1f}" for time in times(layer, x, device))), flush=True)


if __name__ == "__main__":
    main()
