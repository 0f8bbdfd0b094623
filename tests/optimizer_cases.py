"""Steps of optimizers as test cases: the arguments of the operator, made from a seed, and their comparison."""

from dataclasses import dataclass

from helpers import seeded
from native_cpu import assert_same_floats
import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes._ops import optimizer_moments

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIGNED, UNSIGNED = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
SCALARS = dict(step=5, lr=1e-2, beta1=0.9, beta2=0.99, beta3=0.999, alpha=4.0, eps=1e-8, weight_decay=0.1)
VARIANTS = [
    ("adam", {}),
    ("adam", {"amsgrad": True}),
    ("adam", {"bias_correction": False}),
    ("lamb", {}),
    ("ademamix", {}),
    ("momentum", {"beta2": 0.0}),
    ("lars", {"nesterov": True, "beta2": 0.3}),
    ("lion", {}),
    ("rmsprop", {"beta2": 0.0}),
    ("rmsprop", {}),
    ("rmsprop", {"centered": True}),
    ("rmsprop", {"centered": True, "beta2": 0.0}),
    ("adagrad", {}),
]
EXTREMES = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, -6e-5, 65519.0, -65520.0, 3.3e38, -3.3e38, 1e-20, 1e20]
variants = pytest.mark.parametrize(("algorithm", "options"), VARIANTS, ids=[f"{name}-{'-'.join(options)}".strip("-") for name, options in VARIANTS])


@dataclass
class Case:
    """The arguments of one step. The tensors are those of several parameters."""

    p: list
    g: list
    moments: list
    absmax: list
    qmaps: list
    unorm: list
    settings: dict

    def copy(self) -> "Case":
        lists = ([tensor.clone() for tensor in tensors] for tensors in (self.p, self.g, self.moments, self.absmax, self.qmaps, self.unorm))
        return Case(*lists, self.settings)

    def stepped_by(self, step) -> "Case":
        case = self.copy()
        step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **case.settings)
        return case

    def changed(self) -> list:
        return [*self.p, *self.moments, *self.absmax, *self.unorm]


def maps_of(algorithm: str, count: int) -> list:
    return {"adam": [SIGNED, UNSIGNED, UNSIGNED], "lamb": [SIGNED, UNSIGNED, UNSIGNED], "ademamix": [SIGNED, SIGNED, UNSIGNED]}.get(
        algorithm, [SIGNED] * 3
    )[:count]


def make_case(algorithm, options, shapes, bits=32, dtype=torch.float32, g_dtype=None, seed=0, **more) -> Case:
    generator = seeded(seed)
    chosen = SCALARS | options | more | {"algorithm": algorithm}
    count = optimizer_moments(algorithm, chosen["beta2"], chosen.get("amsgrad", False), chosen.get("centered", False))

    def normal(shape):
        return torch.randn(shape, generator=generator)

    def moment(shape):
        if bits == 8:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return normal(shape) if algorithm in ("momentum", "lars", "lion") else normal(shape).square()

    shapes = [torch.Size(shape if isinstance(shape, tuple) else (shape,)) for shape in shapes]
    p = [normal(shape).to(dtype) for shape in shapes]
    g = [normal(shape).to(g_dtype or dtype) for shape in shapes]
    for gradient in g:
        gradient[torch.rand(gradient.shape, generator=generator) < 0.2] = 0.0
    moments = [moment(shape) for shape in shapes for _ in range(count)]
    absmax = [torch.rand(-(-shape.numel() // 256), generator=generator) for shape in shapes for _ in range(count)] if bits == 8 else []
    unorm = [torch.zeros(1) for _ in shapes] if chosen.get("max_unorm", 0.0) > 0.0 else []
    return Case(p, g, moments, absmax, maps_of(algorithm, count) if bits == 8 else [], unorm, chosen)


def assert_same(actual: Case, expected: Case) -> None:
    for one, other in zip(actual.changed(), expected.changed(), strict=True):
        if one.dtype == torch.uint8:
            assert torch.equal(one, other)
        else:
            assert_same_floats(one.flatten(), other.flatten())
