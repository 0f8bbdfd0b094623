"""Steps of optimizers as test cases: the arguments of the operator, made from a seed, their comparison, and what a native library is given."""

from collections.abc import Iterator
import ctypes as ct
from dataclasses import dataclass

from helpers import seeded
from native_cpu import assert_same_floats, at_page_edge
import numpy as np
import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes._ops import optimizer_moments
from bitsandbytes.backends.native_optimizers import NativeSettings, NativeTensors

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


def assert_nothing_beyond_is_touched(step, length: int, bits: int, at_end: bool) -> None:
    """Steps tensors that end, or begin, where memory does."""

    def edge(tensor):
        words = {4: np.int32, 2: np.int16, 1: np.uint8}[tensor.element_size()]
        return torch.from_numpy(at_page_edge(tensor.view(torch.uint8).numpy().view(words), at_end)).view(tensor.dtype)

    for dtype in FLOATS:
        for more in ({}, {"seeds": [1]}, {"max_unorm": 0.1}, {"skip_zeros": True}):
            case = make_case("adam", {"amsgrad": True}, [length], bits, dtype, **more)
            expected = case.stepped_by(step)
            for tensors in (case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm):
                tensors[:] = map(edge, tensors)
            step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **case.settings)
            assert_same(case, expected)


class RawStep:
    """A call of a native library's C function, whose fields can be spoilt one by one. The call itself is the backend's."""

    def __init__(self):
        self.case = make_case("adam", {}, [600], 8, max_unorm=0.1)
        self.keep = []
        pointer, case = self.pointers, self.case
        numbers = {"sizes": [600], "g_dtypes": [0], "seeds": [5]}
        self.tensors = NativeTensors(
            count=1, p=pointer(case.p), g=pointer(case.g), moments=pointer(case.moments), absmax=pointer(case.absmax),
            update_norms=case.unorm[0].data_ptr(), **{name: self.integers(values) for name, values in numbers.items()},
        )  # fmt: skip
        s = SCALARS
        self.settings = NativeSettings(
            0, 0, 3, s["lr"], s["beta1"], s["beta2"], s["beta3"], s["alpha"], s["eps"], 0.0, 1.0, 0.5, 0.5, 0.1, -1.0, 1, 0, 0, 0, 0,
            (ct.c_void_p * 3)(*(code.data_ptr() for code in case.qmaps)),
        )  # fmt: skip

    def pointers(self, tensors) -> int:
        return self.integers([0 if tensor is None else tensor.data_ptr() for tensor in tensors])

    def integers(self, values) -> int:
        self.keep.append((ct.c_int64 * len(values))(*values))
        return ct.addressof(self.keep[-1])


SPOILT_TENSORS = {
    "negative count": lambda raw: {"count": -1},
    "immense count": lambda raw: {"count": 2**62},
    "negative size": lambda raw: {"sizes": raw.integers([-1])},
    "immense size": lambda raw: {"sizes": raw.integers([2**62])},
    "unknown dtype of the gradient": lambda raw: {"g_dtypes": raw.integers([3])},
    "a dtype that only looks right in 32 bits": lambda raw: {"g_dtypes": raw.integers([2**32])},
    "null in p": lambda raw: {"p": raw.pointers([None])},
    "null in g": lambda raw: {"g": raw.pointers([None])},
    "null in moments": lambda raw: {"moments": raw.pointers([raw.case.moments[0], None])},
    "null in absmax": lambda raw: {"absmax": raw.pointers([None, raw.case.absmax[0]])},
} | {f"no {name}": lambda raw, name=name: {name: None} for name in ("sizes", "p", "g", "g_dtypes", "moments", "absmax", "update_norms")}
# The last one needs a third code table.
SPOILT_SETTINGS = [{"algorithm": 6}, {"algorithm": -1}, {"dtype": 3}, {"dtype": -1}, {"dtype": 2**32}, {"step": 0}, {"amsgrad": 1}]


def spoilt_steps(make) -> Iterator[RawStep]:
    """Calls made by ``make``, each with something in it that a native library must refuse."""
    for spoil in SPOILT_TENSORS.values():
        raw = make()
        for name, value in spoil(raw).items():
            setattr(raw.tensors, name, value)
        yield raw
    for fields in SPOILT_SETTINGS:
        raw = make()
        for name, value in fields.items():
            setattr(raw.settings, name, value)
        yield raw
