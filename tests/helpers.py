"""Inputs, and a model in NumPy of what the codes mean, that the tests share.

Nothing here imports the library: the model is a second opinion, written from the tables and the rules alone, and `golden/record.py` uses the
input generators with the published library.
"""

import hashlib
from itertools import product
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed
from torch.utils._pytree import tree_map_only

DEVICE = os.environ.get("BNB_TEST_DEVICE", "cpu")  # where new tensors are: conftest.py
BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
QUANT_TYPES = ("nf4", "fp4")


# ------------------------------------------------------------------------------------------------------------------------------- inputs
def sawtooth(n: int, modulus: int, step: int, divisor: float = 64.0) -> torch.Tensor:
    """fp32 [n] of ((i * step mod modulus) - modulus // 2) / divisor: exact on every machine."""
    i = torch.arange(n, dtype=torch.int64)
    return ((i * step) % modulus - modulus // 2).to(torch.float32) / divisor


def bell(n: int, seed: int = 1) -> torch.Tensor:
    """fp32 [n] with about a normal distribution of deviation 1, from integer arithmetic only, so equal on every machine."""
    x = torch.arange(1, n + 1, dtype=torch.int64) * 2654435761 + seed * 1013904223
    total = torch.zeros(n, dtype=torch.int64)
    for _ in range(4):  # a sum of four uniform 16-bit numbers, each from one round of a 32-bit mixer
        x = (x ^ (x >> 15)) * 739982445 & 0xFFFFFFFF
        x = (x ^ (x >> 12)) * 695872825 & 0xFFFFFFFF
        total += x >> 16
    return (total - 2 * 65536).to(torch.float32) / 2**15 * 0.875


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor where new tensors are."""
    return here(torch.from_numpy(array))


def here(value):
    """A tensor, or a dictionary or sequence of tensors, moved to where new tensors are: what comes from NumPy or a file."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.get_default_device()), value)


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers for new tensors."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def sha(tensor: torch.Tensor, digits: int = 24) -> str:
    """The first `digits` hexadecimal digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()[:digits]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in dtype, shape and every bit, so that NaN equals NaN and +0 differs from -0."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if raw_bytes(actual) != raw_bytes(expected):
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        wrong = (actual.contiguous().view(integer) != expected.contiguous().view(integer)).reshape(-1).nonzero().reshape(-1)
        first = wrong[0].item()
        values = actual.reshape(-1)[first].item(), expected.reshape(-1)[first].item()
        raise AssertionError(f"{wrong.numel()} of {actual.numel()} elements differ, first at {first}: {values[0]!r}, expected {values[1]!r}")


def quantised(functional, shape=(64, 64), nested=False, quant_type="nf4", dtype=torch.float32, blocksize=64):
    """A 4-bit tensor of that shape, made by the library's functional layer: packed, and its state."""
    A = bell(torch.Size(shape).numel()).reshape(shape).to(dtype)
    return functional.quantize_4bit(A, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)


def run_python(code: str, *args: str, interpreter: str = sys.executable, **options) -> subprocess.CompletedProcess:
    """Runs a program in a fresh interpreter and returns it finished, with its output as text."""
    return subprocess.run([interpreter, "-c", code, *args], capture_output=True, text=True, timeout=300, **options)


def leave_process_group() -> None:
    """Ends a process of a distributed test whose results are on disk: after the others have come as far, and without the interpreter's own end,
    during which a thread of gloo that is still running would abort the process."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def cpu_only(reason: str):
    """`@cpu_only("why")`: a test that is the same or cannot be on another device."""
    return pytest.mark.skipif(DEVICE != "cpu", reason=reason)


real_device = pytest.mark.skipif(
    "BNB_STANDIN_DEVICE" in os.environ, reason="a stand-in for a GPU (tests/standin) does not do: a compiler asks for the real one"
)


def short_name(value) -> str:
    """A test id: `float32` for torch.float32, str() for the rest."""
    return str(value).removeprefix("torch.")


def grid(**axes):
    """`@grid(a=..., b=...)`: runs a test for every combination, with readable ids."""
    rows = list(product(*axes.values()))
    ids = ["-".join(map(short_name, row)) for row in rows]
    return pytest.mark.parametrize(",".join(axes), rows if len(axes) > 1 else [row[0] for row in rows], ids=ids)


# ------------------------------------------------------------------------------------------------------- the meaning of the codes, in NumPy
def _floats(hexadecimal: str) -> np.ndarray:
    return np.array([int(word, 16) for word in hexadecimal.split()], dtype=np.uint32).view(np.float32)


LEVELS = {
    "nf4": _floats(
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    ),
    "fp4": _floats(
        "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
        " 00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
    ),
}
NF4_THRESHOLDS = _floats(
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)
FP4_THRESHOLDS = _floats("3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555")
FP4_BY_MAGNITUDE = np.array([0, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8)
ZERO_CODE = {"nf4": 7, "fp4": 0}


def scaled_blocks(A: torch.Tensor, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of A divided by the largest magnitude of their block.

    Args:
        A: any shape, taken flat.
        blocksize: elements a block; the last one may be shorter.

    Returns:
        fp32 [n] in [-1, 1] (NaN in a block with a NaN, and for the infinities of a block with one), and absmax, fp32 [blocks].
    """
    x = A.detach().to(torch.float32).reshape(-1).cpu().numpy()
    blocks = -(-x.size // blocksize)
    padded = np.zeros(blocks * blocksize, dtype=np.float32)
    padded[: x.size] = x
    absmax = np.abs(padded.reshape(blocks, blocksize)).max(axis=1) if blocks else np.zeros(0, dtype=np.float32)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / absmax
        v = np.clip(x * np.repeat(inverse, blocksize)[: x.size], -1, 1).astype(np.float32)
    v[(x == 0) & ~np.isnan(np.repeat(absmax, blocksize)[: x.size])] = 0
    return v, absmax


def model_quantize_4bit(A: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What quantize_4bit must store: packed uint8 [(n + 1) // 2, 1] and absmax fp32 [blocks]."""
    v, absmax = scaled_blocks(A, blocksize)
    if quant_type == "nf4":
        codes = np.searchsorted(NF4_THRESHOLDS, v, side="left").astype(np.uint8)
    else:
        codes = FP4_BY_MAGNITUDE[np.searchsorted(FP4_THRESHOLDS, np.abs(v), side="left")]
        codes = codes | np.where((v < 0) & (codes != 0), 8, 0).astype(np.uint8)
    return from_numpy(pack(codes, quant_type)), from_numpy(absmax)


def pack(codes: np.ndarray, quant_type: str) -> np.ndarray:
    """Two codes a byte, the first in the high half; an odd tail is filled with the code of zero."""
    padded = np.full((codes.size + 1) // 2 * 2, ZERO_CODE[quant_type], dtype=np.uint8)
    padded[: codes.size] = codes
    return (padded[0::2] << 4 | padded[1::2]).reshape(-1, 1)


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The n codes, uint8 [n], of a packed tensor of any storage dtype."""
    data = np.frombuffer(raw_bytes(packed), dtype=np.uint8)
    return from_numpy(np.stack([data >> 4, data & 15], axis=1).reshape(-1)[:n].copy())


def model_dequantize_4bit(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape, dtype) -> torch.Tensor:
    """fl(level * absmax) in fp32, rounded once to dtype."""
    n = int(np.prod(shape))
    return model_dequantize(unpack(packed, n), absmax, from_numpy(LEVELS[quant_type]), blocksize, dtype).reshape(tuple(shape))


def model_dequantize(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype) -> torch.Tensor:
    """code[codes] * absmax[i // blocksize] over the flat order, rounded once to dtype, in the shape of codes."""
    n = codes.numel()
    levels = code.cpu().numpy()[codes.reshape(-1).cpu().numpy()]
    with np.errstate(all="ignore"):
        values = levels * np.repeat(absmax.cpu().numpy(), blocksize)[:n]
    return from_numpy(values.astype(np.float32)).to(dtype).reshape(codes.shape)


def model_quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What quantize_blockwise must store: the nearest of 256 sorted values, uint8 like A, and absmax fp32 [blocks]."""
    v, absmax = scaled_blocks(A, blocksize)
    c = code.cpu().numpy()
    midpoints = (c[:-1] + c[1:]) * np.float32(0.5)
    codes = np.searchsorted(midpoints, v, side="left").astype(np.uint8)
    return from_numpy(codes).reshape(A.shape), from_numpy(absmax)
