"""Small helpers without a home of their own: JSON in tensors, format numbers of int8 checkpoints, shell output, device sync.

Replacing linear layers and finding outlier features live in small modules of their own and are re-exported here.
"""

import json
import subprocess

import torch

from .outliers import OutlierTracer, find_outlier_dims, outlier_hook  # noqa: F401
from .replacement import modules_to_skip, replace_linear  # noqa: F401

# Layouts that int8 checkpoints were written in; the number is what `weight_format` holds.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: dict) -> torch.Tensor:
    """A JSON-serialisable dict as the UTF-8 bytes of its JSON, uint8 [length], on the CPU."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict:
    """Inverse of ``pack_dict_to_tensor``.

    Raises:
        ValueError: the bytes are not JSON (UnicodeDecodeError and json.JSONDecodeError are both ValueErrors).
    """
    return json.loads(bytes(tensor_data.cpu().reshape(-1).tolist()))


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Runs a command (split at white space, no shell) and returns its stripped standard output and standard error."""
    done = subprocess.run(command_string.split(), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def sync_gpu(t: torch.Tensor) -> None:
    """Waits for the device of ``t`` if it is a CUDA or XPU device."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)
