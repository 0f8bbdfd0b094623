"""Records checkpoints of the published library's optimizers. Run it with an interpreter that has bitsandbytes 0.50.2:

    python tests/golden/record_optim.py [FILE]

For each optimizer: its state dict after three steps, the parameters then, and the parameters after two steps more.
"""

from copy import deepcopy
from pathlib import Path
import sys

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import bell  # noqa: E402

import bitsandbytes as bnb  # noqa: E402

# name -> (class, arguments)
OPTIMIZERS = {
    "AdamW": ("AdamW", dict(lr=1e-2)),
    "AdamW8bit": ("AdamW8bit", dict(lr=1e-2, min_8bit_size=256)),
    "AdEMAMix8bit": ("AdEMAMix8bit", dict(lr=1e-2, min_8bit_size=256, t_alpha=10, t_beta3=10)),
    "Lion8bit": ("Lion8bit", dict(lr=1e-3, min_8bit_size=256)),
    "SGD": ("SGD", dict(lr=1e-2, momentum=0.9, weight_decay=0.1)),
}


def start(name):
    """Two parameters, one for 8-bit states and one too small for them, and their optimizer."""
    cls, kwargs = OPTIMIZERS[name]
    params = [torch.nn.Parameter(bell(600).view(20, 30)), torch.nn.Parameter(bell(50, seed=2))]
    return params, getattr(bnb.optim, cls)(params, **kwargs)


def train(params, optimizer, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = (bell(p.numel(), seed=10 * step + i) * 0.1).view(p.shape)
        optimizer.step()
    return [p.detach().clone() for p in params]


def record(file: str) -> None:
    recorded = {}
    for name in OPTIMIZERS:
        params, optimizer = start(name)
        then = train(params, optimizer, range(3))
        state = deepcopy(optimizer.state_dict())
        recorded[name] = {"state": state, "then": then, "end": train(params, optimizer, range(3, 5))}
    torch.save(recorded, file)


if __name__ == "__main__":
    record(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("optim.pt")))
