"""Does each operator compute here what it should? Small inputs in every dtype, against the PyTorch reference on the CPU.

Runs in a process of its own: an instruction that the processor lacks, or a kernel that reads where it must not, ends that process and not the
diagnosis. It announces each operator before it runs, so that the one that ended it is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
import json
import signal
import subprocess
import sys

import torch

from .. import functional
from .._ops import _CHECKS as OPERATORS
from .._ops import FLOATS
from ..backends.default import int8, ops, optimizers

# Largest difference of a floating-point result, as a share of its largest magnitude: rounding once more than the reference does.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_SECONDS = 300
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from bitsandbytes.diagnostics import selfcheck; selfcheck.report(sys.argv[2])"


@dataclass(frozen=True)
class Outcome:
    """What came of checking one operator on one device.

    Attributes:
        operator: its name, with ``.out`` for that form.
        status: "ok"; "wrong" (other results than the reference), "failed" (it raised), "died" (the process ended), "not checked".
        detail: what was seen, for anything but "ok".
    """

    operator: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """A call to compare.

    Attributes:
        arguments: in the order of the schema.
        tolerance: for floating-point results, as in ``TOLERANCE``; 0 where they must agree in every bit.
        slack: how far integer results may be apart.
        written: positions of the arguments that the operator changes; their values are compared too.
    """

    arguments: tuple
    tolerance: float = 0.0
    slack: int = 0
    written: tuple[int, ...] = ()


# ------------------------------------------------------------------------------------------------------------------------ the calls


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """A call of every operator with data in ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tolerance = TOLERANCE[dtype]
    return {**_cases_4bit(normal, dtype, tolerance), **_cases_8bit(normal, dtype), **_cases_int8(normal, dtype, tolerance), **_cases_optim(normal)}


def _cases_4bit(normal, dtype, tolerance) -> dict[str, Case]:
    out_features, in_features, tokens = 48, 192, 5
    shape = [out_features, in_features]
    weight, activation, gradient, bias = normal(*shape), normal(tokens, in_features), normal(tokens, out_features), normal(out_features)
    packed, absmax = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
    levels = functional.get_4bit_type("nf4", device="cpu")
    dequantise = (packed, absmax, 64, "nf4", shape, dtype)
    multiply = (activation, packed, shape, absmax, levels, 64)
    product = (tokens, out_features)
    return {
        "quantize_4bit": Case((weight, 64, "nf4", torch.uint8)),
        "dequantize_4bit": Case(dequantise),
        "dequantize_4bit.out": Case((*dequantise, torch.empty(shape, dtype=dtype))),
        "gemm_4bit": Case((activation, packed, shape, absmax, 64, "nf4", bias), tolerance),
        "gemm_4bit_backward": Case((gradient, packed, shape, absmax, 64, "nf4"), tolerance),
        "gemv_4bit": Case(multiply, tolerance),
        "gemv_4bit.out": Case((*multiply, torch.empty(product, dtype=dtype)), tolerance),
    }


def _cases_8bit(normal, dtype) -> dict[str, Case]:
    values, code = normal(33, 70), functional.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(values, code, 256)
    dequantise = (codes, absmax, code, 256, dtype)
    return {
        "quantize_blockwise": Case((values, code, 256)),
        "dequantize_blockwise": Case(dequantise),
        "dequantize_blockwise.out": Case((*dequantise, torch.empty(codes.shape, dtype=dtype))),
    }


def _cases_int8(normal, dtype, tolerance) -> dict[str, Case]:
    out_features, in_features, tokens = 48, 192, 5
    activation, bias, gradient = normal(tokens, in_features), normal(out_features), normal(tokens, out_features)
    activation[:, 7] *= 8  # an outlier column
    threshold = 10.0
    CA, SCA, outliers = int8.int8_vectorwise_quant(activation, threshold)
    CB, SCB, _ = int8.int8_vectorwise_quant(normal(out_features, in_features))
    product = int8.int8_linear_matmul(CA, CB)
    return {
        "int8_vectorwise_quant": Case((activation, threshold)),
        "int8_double_quant": Case((activation, threshold)),
        "int8_vectorwise_dequant": Case((CB, SCB)),
        "int8_linear_matmul": Case((CA, CB)),
        "int8_linear_matmul.out": Case((CA, CB, torch.empty_like(product))),
        "int8_mm_dequant": Case((product, SCA, SCB, dtype, bias), tolerance),
        "int8_scaled_mm": Case((CA, CB, SCA, SCB, bias, dtype), tolerance),
        "int8_mixed_scaled_mm": Case((activation, CA, CB, SCA, SCB, outliers, bias), tolerance),
        "int8_linear": Case((activation, CB, SCB, bias, threshold), tolerance),
        "int8_linear_backward": Case((gradient, CB, SCB), tolerance),
    }


def _cases_optim(normal) -> dict[str, Case]:
    size, blocks = 700, 3
    p, g = normal(size), normal(size)
    signed, unsigned = functional.create_dynamic_map(), functional.create_dynamic_map(signed=False)
    moments, codes = torch.zeros(2, size), torch.zeros(2, size, dtype=torch.uint8)
    absmax = torch.zeros(2, blocks)
    betas, lr, eps = (0.9, 0.99, 0.0, 0.0), 0.01, 1e-8
    tolerance = TOLERANCE[p.dtype]
    return {
        "optimizer_update_32bit": Case(
            ("adam", g, p, moments[0], moments[1], None, 0.0, 0.0, *betas, eps, 0.01, 1, lr, 1.0, False), tolerance, written=(2, 3, 4)
        ),
        "optimizer_update_8bit_blockwise": Case(
            ("adam", g, p, codes[0], codes[1], *betas, eps, 1, lr, signed, unsigned, absmax[0], absmax[1], 0.01, 1.0, False),
            tolerance, slack=1, written=(2, 3, 4, 13, 14),
        ),
        "optimizer_step": Case(
            ([p], [g], [moments[0], moments[1]], [], [], [], "adam", 1, lr, *betas, eps, 0.01), tolerance, written=(0, 2)
        ),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- the comparison


def check(operator: str, device: str) -> Outcome:
    """Compares an operator with the reference, in every dtype."""
    for dtype in FLOATS:
        case = cases(dtype).get(operator)
        if case is None:
            return Outcome(operator, "not checked", "there is no check for this operator")
        try:
            found = _results(_operator(operator), case, device)
        except Exception as error:  # whatever a broken installation raises is what there is to report
            return Outcome(operator, "failed", f"{dtype}: {type(error).__name__}: {error}")
        difference = _first_difference(found, _results(_reference(operator), case, "cpu"), case)
        if difference:
            return Outcome(operator, "wrong", f"{dtype}: {difference}")
    return Outcome(operator, "ok")


def _operator(name: str):
    packet, _, form = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, packet), form or "default")


def _reference(name: str):
    packet, _, form = name.partition(".")
    function = next(getattr(module, packet) for module in (ops, int8, optimizers) if hasattr(module, packet))
    return (lambda *arguments: arguments[-1].copy_(function(*arguments[:-1]))) if form else function


def _results(function, case: Case, device: str) -> list:
    """What a call gives and what it changes, on the CPU."""
    arguments = [_copied(value, device) for value in case.arguments]
    returned = function(*arguments)
    if returned is None and not case.written:  # an out form
        returned = arguments[-1]
    changed = [arguments[i] for i in case.written]
    return list(_flattened([returned, *changed]))


def _copied(value, device: str):
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_copied(tensor, device) for tensor in value]
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _flattened(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flattened(value)
        elif value is not None:
            yield value.cpu()


def _first_difference(found: list, expected: list, case: Case) -> str:
    """What is wrong with the results, in words; "" for nothing."""
    if len(found) != len(expected):
        return f"{len(found)} results instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
        apart = (a.double() - b.double()).abs()
        allowed = case.tolerance * b.double().abs().max().item() if b.is_floating_point() else case.slack
        wrong = ~(apart <= allowed) & ~(a.isnan() & b.isnan())
        if wrong.any():
            at = wrong.flatten().nonzero()[0].item()
            return f"{int(wrong.sum())} of {b.numel()} values of result {i} are wrong: {a.flatten()[at].item()} instead of {b.flatten()[at].item()}"
    return ""


# ----------------------------------------------------------------------------------------------------------------------- the process


def report(device: str) -> None:
    """Checks every operator on a device and writes a line of JSON before and after each. What the child process runs."""
    for operator in OPERATORS:
        print(json.dumps({"begins": operator}), flush=True)
        print(json.dumps(vars(check(operator, device))), flush=True)


def run(device: str) -> list[Outcome]:
    """The outcomes of every operator on a device ("cpu", "cuda", ...), found in a process of its own."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        output, ending = done.stdout, _ending(done)
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or ""
        output, ending = kept if isinstance(kept, str) else kept.decode(), f"it did not end within {_SECONDS} seconds"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    outcomes = [Outcome(**line) for line in lines if "begins" not in line]
    begun = [line["begins"] for line in lines if "begins" in line]
    if len(begun) > len(outcomes):
        outcomes.append(Outcome(begun[-1], "died", ending))
    rest = "the process ended before" if begun else f"the process did not start: {ending}"
    return outcomes + [Outcome(operator, "not checked", rest) for operator in OPERATORS if operator not in begun]


def _ending(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return last[0]
