"""Cases of gpu_benchmark.py: steps of optimizers.

Predictions for 8 bit come from a count of instructions: about 90 an element for Adam, of which a GPU of four instructions a cycle issues as many as
85 % of its memory's rate asks for. Steps with states of 32 bits are bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
import ctypes as ct

from gpu_benchmark import DTYPES, Case, Machine
from gpu_cases_quantize import pointer
import torch

from bitsandbytes import functional
from bitsandbytes.backends.cuda import optimizers
from bitsandbytes.backends.default.optimizers import Settings
from bitsandbytes.backends.native_optimizers import Step

SETTINGS = Settings(beta1=0.9, beta2=0.999, beta3=0.9999, alpha=5.0, eps=1e-8, weight_decay=0.01, step=10, lr=1e-4, gnorm_scale=1.0)
MOMENTS = {"adam": 2, "lion": 1, "momentum": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
PREDICTED = {8: 0.72, 32: 0.85}
LORA = (448, 94_000)  # the parameters of adapters of an 8B model, and elements of each


class Operands:
    """Parameters of one size with their gradients and moments, and copies of what a step changes for the published library."""

    def __init__(self, machine: Machine, algorithm: str, bits: int, dtype: torch.dtype, tensors: int, n: int):
        self.machine, self.algorithm, self.bits, self.n, count = machine, algorithm, bits, n, MOMENTS[algorithm]
        blocks = -(-n // 256)
        zeros = dict(device=machine.device, dtype=torch.uint8 if bits == 8 else torch.float32)
        self.p, self.g = ([torch.randn(n, device=machine.device, dtype=dtype) for _ in range(tensors)] for _ in range(2))
        # Rows of one tensor for each parameter: AdEMAMix has its two means next to each other.
        self.moments = [torch.zeros(count, n, **zeros) for _ in range(tensors)]
        self.absmax = [torch.full((count, blocks), 1e-3, device=machine.device) for _ in range(tensors)] if bits == 8 else []
        self.signed, self.unsigned = (functional.create_dynamic_map(signed=signed).to(machine.device) for signed in (True, False))
        self.norm = torch.zeros(1, device=machine.device)
        self.kept = [[tensor.clone() for tensor in tensors] for tensors in (self.p, self.moments, self.absmax)]

    def qmaps(self) -> list:
        maps = {"adam": [self.signed, self.unsigned], "ademamix": [self.signed, self.signed, self.unsigned]}
        return maps.get(self.algorithm, [self.signed]) if self.bits == 8 else []

    def ours(self, max_unorm: float):
        """One native call, whose arguments are made once."""
        unorm = [torch.zeros(1, device=self.machine.device) for _ in self.p] if max_unorm else []
        rows = ([row for tensor in tensors for row in tensor] for tensors in (self.moments, self.absmax))
        prepared = Step(optimizers.call, self.algorithm, SETTINGS, self.qmaps(), False, max_unorm).prepare(self.p, self.g, *rows, [])
        return lambda: optimizers.call(prepared.tensors, prepared.settings, self.p[0], unorm)

    def published(self, suffix: str, max_unorm: float):
        """A call for each parameter."""
        library, s = self.machine.published, SETTINGS
        if library is None:
            return None
        numbers = [ct.c_float(number) for number in (s.beta1, s.beta2, s.beta3, s.alpha, s.eps)]
        step, lr, decay, scale, n = ct.c_int32(s.step), ct.c_float(s.lr), ct.c_float(s.weight_decay), ct.c_float(s.gnorm_scale), ct.c_int32(self.n)
        p, moments, absmax = self.kept
        calls = []
        for i in range(len(p)):
            first, second = moments[i], moments[i][-1] if MOMENTS[self.algorithm] > 1 else None
            if self.bits == 8:
                function = getattr(library, f"c{self.algorithm}_8bit_blockwise_grad_{suffix}")
                statistics = absmax[i], absmax[i][-1] if MOMENTS[self.algorithm] > 1 else None
                tensors = map(pointer, (self.signed, self.unsigned, *statistics))
                arguments = (*map(pointer, (p[i], self.g[i], first, second)), *numbers, step, lr, *tensors, decay, scale, ct.c_bool(False), n)
            else:
                function = getattr(library, f"c{self.algorithm}32bit_grad_{suffix}")
                limit = ct.c_float(max_unorm), ct.c_float(1.0)
                arguments = (
                    *map(pointer, (self.g[i], p[i], first, second, self.norm)),
                    *limit,
                    *numbers,
                    decay,
                    step,
                    lr,
                    scale,
                    ct.c_bool(False),
                    n,
                )
            calls.append((function, arguments))
        self.calls = calls

        def run():
            for function, arguments in self.calls:  # addresses: the tensors live as long as the operands
                function(*arguments)

        return run


def cases(machine: Machine) -> Iterator[Case]:
    def elements(n: int) -> int:
        return max(4096, n // machine.shrink)

    for dtype in ("bf16", "fp32"):
        for n in (1 << 20, 1 << 26, 10**9):
            yield step(machine, "adam", 8, dtype, 1, elements(n))
    for algorithm in ("lion", "ademamix"):
        yield step(machine, algorithm, 8, "bf16", 1, elements(1 << 28))
    for algorithm in ("adam", "lion"):
        yield step(machine, algorithm, 32, "bf16", 1, elements(1 << 28))
    yield step(machine, "adam", 8, "bf16", max(2, 1000 // machine.shrink), 65_536 if machine.shrink == 1 else 4096)
    yield step(machine, "adam", 8, "bf16", max(2, LORA[0] // machine.shrink), LORA[1] if machine.shrink == 1 else 4096)
    yield step(machine, "adam", 32, "bf16", 1, elements(1 << 26), max_unorm=1.0)


def step(machine: Machine, algorithm: str, bits: int, dtype: str, tensors: int, n: int, max_unorm: float = 0.0) -> Case:
    width, state = DTYPES[dtype].itemsize, 1 + 4 / 256 if bits == 8 else 4
    traffic = tensors * int(n * (3 * width + 2 * MOMENTS[algorithm] * state))
    if max_unorm:
        traffic += tensors * int(n * (2 * width + MOMENTS[algorithm] * state))

    def build():
        operands = Operands(machine, algorithm, bits, DTYPES[dtype], tensors, n)
        return operands.ours(max_unorm), operands.published(dtype, max_unorm)

    name = f"optimizer_step {algorithm} {bits} bit" + (" with a limit" if max_unorm else "")
    return Case(name, {"n": n, "dtype": dtype, "tensors": tensors}, traffic, build, predicted=PREDICTED[bits], published_graph=False)
