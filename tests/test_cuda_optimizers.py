"""Optimizer steps of the CUDA library, whose kernels run here on the CPU, against the reference in plain PyTorch.

Parameters, moments, codes and their statistics are compared bit for bit. Only the norms that ``max_unorm`` needs are sums whose order differs.
"""

import ctypes as ct

from native_cpu import assert_same_floats
from native_cuda import cuda, cuda_once, emulated_library, no_streams  # noqa: F401
import numpy as np
from optimizer_cases import (
    EXTREMES,
    FLOATS,
    SIGNED,
    UNSIGNED,
    Case,
    RawStep,
    assert_nothing_beyond_is_touched,
    assert_same,
    make_case,
    spoilt_steps,
    variants,
)
import pytest
import torch

from bitsandbytes import paging
from bitsandbytes.backends.cuda import optimizers as native
from bitsandbytes.backends.default import optimizers as reference
from bitsandbytes.cextension import CudaBNBNativeLibrary

TAILS = [0, 1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049, 0]
bits = pytest.mark.parametrize("bits", [32, 8])


def assert_steps_like_the_reference(case: Case) -> None:
    assert_same(case.stepped_by(native.optimizer_step), case.stepped_by(reference.optimizer_step))


# ---------------------------------------------------------------------------------------------------------------------- bit for bit
@variants
@bits
def test_every_algorithm_at_every_length(cuda, algorithm, options, bits):
    assert_steps_like_the_reference(make_case(algorithm, options, TAILS, bits))


@variants
@bits
def test_every_pair_of_element_types(cuda_once, algorithm, options, bits):
    for dtype in FLOATS:
        for g_dtype in FLOATS:
            assert_steps_like_the_reference(make_case(algorithm, options, [700, 256], bits, dtype, g_dtype))


SETTINGS = [
    {"step": 1},
    {"step": 10**6, "eps": 0.0},
    {"weight_decay": 0.0, "gnorm_scale": -1.0},
    {"decoupled_weight_decay": False, "gnorm_scale": 0.3},
    {"skip_zeros": True, "weight_decay": 0.5},
    {"seeds": [7, 4_000_000_000, 0], "lr": 1e-4},
    {"seeds": [1, 2, 3], "skip_zeros": True, "decoupled_weight_decay": False},
]


@variants
@bits
@pytest.mark.parametrize("settings", SETTINGS, ids=["-".join(chosen) for chosen in SETTINGS])
def test_settings(cuda_once, algorithm, options, bits, settings):
    for dtype, g_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        assert_steps_like_the_reference(make_case(algorithm, options, [600, 0, 258], bits, dtype, g_dtype, **settings))


@variants
@bits
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_special_values(cuda_once, algorithm, options, bits, skip_zeros):
    values = torch.tensor(EXTREMES)
    for dtype in FLOATS:
        case = make_case(algorithm, options, [1024, 256, 40], bits, dtype, skip_zeros=skip_zeros)
        case.g[0][: 7 * len(values) : 7] = values.to(dtype)
        case.p[0][5 : 5 + len(values)] = values.to(dtype)
        case.g[1].fill_(0.0)
        case.g[2].copy_(values.repeat(3)[:40])
        if bits == 32:
            case.moments[0][300 : 300 + len(values)] = values
        else:
            case.absmax[0][:3] = torch.tensor([0.0, 1e-42, 3e38])
        assert_steps_like_the_reference(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@bits
def test_100_steps(cuda_once, dtype, bits):
    mine = make_case("adam", {"amsgrad": True}, [1000, 300], bits, dtype)
    expected = mine.copy()
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        gradients = [torch.randn(g.shape, generator=generator).to(dtype) for g in mine.g]
        for case, backend in ((mine, native), (expected, reference)):
            case.g = gradients
            settings = {**case.settings, "step": step, "seeds": [3, 4]}
            backend.optimizer_step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **settings)
    assert_same(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_keeps_the_mean(cuda_once, dtype):
    value, n = 1.0 + 0.3 * torch.finfo(dtype).eps, 4096
    case = make_case("momentum", {"beta2": 0.0}, [n], 32, dtype, torch.float32, weight_decay=0.0, lr=-1.0, seeds=[4_000_000_000], step=1)
    case.p[0].fill_(1.0)
    case.g[0].fill_(value - 1.0)
    after = case.stepped_by(native.optimizer_step)
    assert set(after.p[0].tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    share = (after.p[0] > 1.0).double().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------- codes
def crowded_near(value: float) -> torch.Tensor:
    return torch.cat([torch.linspace(-1, -0.9, 100), value + torch.linspace(-1e-6, 1e-6, 56), torch.linspace(0.9, 1, 100)]).sort().values


CODES = {
    "signed": SIGNED, "unsigned": UNSIGNED, "linear": torch.linspace(-1, 1, 256), "without zero": torch.linspace(0, 1, 257)[1:],
    "negative": -UNSIGNED.flip(0), "crowded": crowded_near(0.3), "crowded at zero": crowded_near(0.0), "beyond one": torch.linspace(-3, 3, 256),
    "threshold at one": torch.cat([torch.tensor([-1.0, -1.0]), torch.linspace(-0.9, 0.9, 252), torch.tensor([1.0, 1.0])]),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("capability", [75, 86, 90])
def test_any_code_on_any_device(cuda_once, code, capability):
    """Devices differ in how much of the tables their memory takes."""
    cuda_once.be(capability=capability)
    for algorithm, options in (("lion", {}), ("adam", {}), ("adam", {"amsgrad": True})):
        case = make_case(algorithm, options, [1500], 8)
        case.qmaps[0] = code
        for moment, absmax in zip(case.moments, case.absmax):
            moment[::3] = torch.randint(0, 256, moment[::3].shape, dtype=torch.uint8)
            absmax[2] = 0.0
        assert_steps_like_the_reference(case)
        case.qmaps = [code.clone() for _ in case.qmaps]  # tables of its own for each moment
        assert_steps_like_the_reference(case)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.nextafter(values, torch.tensor(-2.0)), values, torch.nextafter(values, torch.tensor(2.0))])


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_on_both_sides_of_every_threshold(cuda_once, code):
    thresholds = (code[:-1] + code[1:]) * 0.5
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-25, 2.0**-24, 1e-7])
    values = torch.cat([neighbours(thresholds), neighbours(code), neighbours(tiny), neighbours(-tiny), torch.tensor([0.0, -0.0])]).clamp(-1.0, 1.0)
    blocks = torch.ones(-(-values.numel() // 255), 256)  # the first element makes the scale 1
    blocks[:, 1:] = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    for scale in (1.0, 3e-42, 1e38):
        case = make_case("lion", {"beta2": 0.0}, [blocks.numel()], 8, weight_decay=0.0)  # without memory the moment is the gradient
        case.g[0], case.qmaps[0] = (blocks * scale).flatten(), code
        assert_steps_like_the_reference(case)


def test_codes_that_do_not_ascend_stay_within_their_tables(cuda_once):
    """On a GPU nobody can look at them in time; what they give means nothing."""
    for code in (SIGNED.flip(0), SIGNED[torch.randperm(256)], torch.full((256,), float("nan")), torch.full((256,), 3e38)):
        case = make_case("adam", {}, [600], 8)
        case.qmaps = [code.contiguous()] * 2
        case.stepped_by(native.optimizer_step)


# ---------------------------------------------------------------------------------------------------------------------- many parameters
@bits
def test_more_parameters_than_a_launch_takes(cuda_once, bits):
    lengths = [*range(0, 300, 3), 5000, 0, 1]
    seeds = [i * 7919 for i in range(len(lengths))]
    assert_steps_like_the_reference(make_case("adam", {}, lengths, bits, torch.bfloat16, seeds=seeds))
    assert_steps_like_the_reference(make_case("lion", {}, [0, 0, 0], bits))


@bits
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_aligned_to_elements_only(cuda_once, bits, offset):
    def moved(tensor):
        storage = tensor.new_empty(tensor.numel() + 8)[offset : offset + tensor.numel()]
        return storage.copy_(tensor)

    for dtype in (torch.float32, torch.bfloat16):
        aligned = make_case("adam", {}, [1000, 256], bits, dtype)
        expected = aligned.stepped_by(reference.optimizer_step)
        for name in ("p", "g", "moments", "absmax"):
            case = aligned.copy()
            getattr(case, name)[:] = map(moved, getattr(case, name))
            native.optimizer_step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **case.settings)
            assert_same(case, expected)


@bits
def test_layouts_that_are_not_contiguous(cuda_once, bits):
    case = make_case("adam", {}, [(20, 30), (2, 6, 8, 8)], bits)
    case.p = [case.p[0].t().contiguous().t(), case.p[1].contiguous(memory_format=torch.channels_last)]
    case.g = [torch.stack([case.g[0]] * 2, dim=-1)[..., 0], case.g[1].contiguous(memory_format=torch.channels_last)]
    assert not case.p[0].is_contiguous() and not case.g[1].is_contiguous()
    after = case.stepped_by(native.optimizer_step)
    assert [tensor.stride() for tensor in after.p] == [tensor.stride() for tensor in case.p]
    assert_same(after, case.stepped_by(reference.optimizer_step))


def test_parameters_that_overlap_are_stepped_one_after_the_other(cuda_once):
    whole = make_case("adam", {}, [1000], 32).p[0]
    after = []
    for backend in (native, reference):
        base = whole.clone()
        case = make_case("adam", {}, [600, 600], 32)
        case.p = [base[:600], base[400:]]
        backend.optimizer_step(case.p, case.g, case.moments, [], [], [], **case.settings)
        after.append(base)
    assert_same_floats(*after)


@pytest.mark.parametrize("name", ["adam", "lamb", "ademamix", "momentum", "lars", "lion", "rmsprop", "adagrad"])
@bits
def test_published_operators(cuda_once, name, bits):
    call = PublishedCall(name, bits)
    mine, expected = call.tensors(), call.tensors()
    call.operator(native, *mine)
    call.operator(reference, *expected)
    for one, other in zip(mine, expected):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(mine[0], call.p)


# ---------------------------------------------------------------------------------------------------------------------- norms
@variants
@bits
def test_the_limit_on_the_norm(cuda_once, algorithm, options, bits):
    case = make_case(algorithm, options, [3000, 0, 100, 20_000], bits, max_unorm=0.02)
    case.p[2].zero_()  # is never limited
    if bits == 8 and algorithm in ("rmsprop", "adagrad"):
        case.qmaps[0] = UNSIGNED  # the moment is a mean of squares
    mine, expected = case.stepped_by(native.optimizer_step), case.stepped_by(reference.optimizer_step)
    torch.testing.assert_close(mine.unorm, expected.unorm, rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.p, expected.p, rtol=1e-5, atol=1e-6)
    assert not torch.equal(mine.p[3], case.stepped_by(lambda *a, **s: native.optimizer_step(*a, **(s | {"max_unorm": 0.0}))).p[3])
    for one, other in zip(mine.moments + mine.absmax, expected.moments + expected.absmax):
        assert_same_floats(one.float().flatten(), other.float().flatten())  # the limit does not concern them


def test_norms_are_left_in_tensors_of_any_shape(cuda_once):
    case = make_case("lamb", {}, [300, 300, 300], max_unorm=0.1)
    case.unorm = [torch.zeros(1), torch.zeros(()), torch.zeros(2, 2)]
    after = case.stepped_by(native.optimizer_step)
    for norm, expected in zip(after.unorm, case.stepped_by(reference.optimizer_step).unorm):
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


@bits
def test_norms_leave_skipped_elements_out(cuda_once, bits):
    for dtype in FLOATS:
        case = make_case("lamb", {}, [777, 3000], bits, dtype, max_unorm=0.1, skip_zeros=True)
        mine, expected = case.stepped_by(native.optimizer_step), case.stepped_by(reference.optimizer_step)
        torch.testing.assert_close(mine.unorm, expected.unorm, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.p, expected.p, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)


def test_norms_are_those_of_double_precision(cuda):
    case = make_case("momentum", {"beta2": 0.0}, [20_001], max_unorm=1e-3, weight_decay=0.0, step=1, lr=1.0)
    case.g[0].mul_(1e20)  # squares overflow in float32
    after = case.stepped_by(native.optimizer_step)
    assert after.unorm[0].item() == np.float32(np.linalg.norm(case.g[0].double().numpy()))
    moved = (after.p[0].double() - case.p[0].double()).norm() / case.p[0].double().norm()
    assert abs(moved - 1e-3) < 1e-7


def test_norms_do_not_depend_on_the_company(cuda_once):
    together = make_case("lamb", {}, [777, 20_000, 5], 8, torch.bfloat16, max_unorm=0.1)
    apart = together.copy()
    native.optimizer_step(together.p, together.g, together.moments, together.absmax, together.qmaps, together.unorm, **together.settings)
    for i in (2, 0, 1):
        own = slice(2 * i, 2 * i + 2)
        native.optimizer_step([apart.p[i]], [apart.g[i]], apart.moments[own], apart.absmax[own], apart.qmaps, [apart.unorm[i]], **apart.settings)
    assert_same(together, apart)


# ---------------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@bits
@pytest.mark.parametrize("length", [1, 3, 130, 255, 600])
def test_nothing_beyond_the_tensors_is_touched(cuda_once, at_end, bits, length):
    assert_nothing_beyond_is_touched(native.optimizer_step, length, bits, at_end)


# ---------------------------------------------------------------------------------------------------------------------- bad arguments
class Raw(RawStep):
    def __init__(self, library):
        super().__init__()
        self.library, self.workspace = library, torch.empty(20, dtype=torch.uint8)

    def call(self, workspace: int | None = 20, device: int = 0) -> int:
        where = (ct.c_void_p(self.workspace.data_ptr()), ct.c_int64(workspace)) if workspace is not None else (None, ct.c_int64(20))
        return self.library.bnb_cuda_optimizer_step(ct.byref(self.tensors), ct.byref(self.settings), *where, device, None)


def test_the_c_function_refuses_nonsense(cuda_once):
    sound = Raw(cuda_once)
    untouched = sound.case.copy()
    assert sound.call() == 0 and not torch.equal(sound.case.p[0], untouched.p[0])
    raws = list(spoilt_steps(lambda: Raw(cuda_once)))
    for raw in raws:
        assert raw.call() == 1
    wants_room = Raw(cuda_once)
    assert wants_room.call(workspace=19) == 1 and wants_room.call(workspace=None) == 1 and wants_room.call(device=3) == 5
    for raw in (*raws, wants_room):
        assert_same(raw.case, untouched)


# ---------------------------------------------------------------------------------------------------------------------- published names
NAMES_32 = {"adam": "cadam32bit_grad_{}", "ademamix": "cademamix32bit_grad_{}", "lion": "clion32bit_grad_{}"} | {
    name: f"c{name}32bit_grad_{{}}" for name in ("momentum", "rmsprop", "adagrad")
}
SUFFIXES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OLD_SUFFIXES = {torch.float32: "32", torch.float16: "16"}


class PublishedCall:
    """A step of one parameter in the shape of the published interfaces."""

    def __init__(self, name: str, bits: int, dtype: torch.dtype = torch.float32, n: int = 1000, max_unorm: float = 0.0):
        generator = torch.Generator().manual_seed(4)
        self.name, self.bits, self.n, self.max_unorm = name, bits, n, max_unorm
        self.two_states, rows = name in ("adam", "lamb", "ademamix"), 2 if name == "ademamix" else 1
        self.p, self.g = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
        self.states = [self._state((rows, n) if rows > 1 else (n,), generator), self._state((n,), generator) if self.two_states else None]
        blocks = -(-n // 256)
        shapes = ((rows, blocks) if rows > 1 else (blocks,), (blocks,) if self.two_states else None)
        self.absmax = [None if shape is None else torch.rand(shape, generator=generator) for shape in shapes]
        # What C functions that take floats are given.
        self.numbers = [float(np.float32(number)) for number in (0.9, 0.99, 0.999, 2.0, 1e-8)]
        self.lr, self.weight_decay, self.gnorm_scale = (float(np.float32(number)) for number in (1e-2, 0.1, 0.5))

    def _state(self, shape, generator):
        if self.bits == 32:
            return torch.rand(shape, generator=generator)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def tensors(self) -> list:
        more = self.absmax if self.bits == 8 else [torch.zeros(1)]
        return [None if tensor is None else tensor.clone() for tensor in (self.p, *self.states, *more)]

    def operator(self, backend, p, state1, state2, *more) -> None:
        if self.bits == 32:
            backend.optimizer_update_32bit(
                self.name, self.g, p, state1, state2, more[0], self.max_unorm, float(np.float32(3.0)), *self.numbers, self.weight_decay, 4, self.lr,
                self.gnorm_scale, True,
            )  # fmt: skip
        else:
            maps = SIGNED, UNSIGNED if self.two_states else None
            backend.optimizer_update_8bit_blockwise(
                self.name, self.g, p, state1, state2, *self.numbers, 4, self.lr, *maps, *more, self.weight_decay, self.gnorm_scale, True
            )

    def c_function(self, library, symbol: str, p, state1, state2, *more) -> None:
        def pointer(tensor):
            return None if tensor is None else ct.c_void_p(tensor.data_ptr())

        numbers = [ct.c_float(number) for number in self.numbers]
        lr, decay, scale = ct.c_float(self.lr), ct.c_float(self.weight_decay), ct.c_float(self.gnorm_scale)
        step, skips, n = ct.c_int32(4), ct.c_bool(True), ct.c_int32(self.n)
        function = getattr(library, symbol)
        if self.bits == 32:
            limit = ct.c_float(self.max_unorm), ct.c_float(3.0)
            function(
                pointer(self.g), pointer(p), pointer(state1), pointer(state2), pointer(more[0]), *limit, *numbers, decay, step, lr, scale, skips, n
            )
        else:
            maps = pointer(SIGNED), pointer(UNSIGNED) if self.two_states else None
            statistics = (pointer(absmax) for absmax in more)
            function(pointer(p), pointer(self.g), pointer(state1), pointer(state2), *numbers, step, lr, *maps, *statistics, decay, scale, skips, n)


@pytest.mark.parametrize("name", NAMES_32)
@bits
def test_published_c_functions(cuda_once, name, bits):
    old = bits == 32 and name in ("momentum", "rmsprop", "adagrad")
    for dtype, suffix in (OLD_SUFFIXES if old else SUFFIXES).items():
        call = PublishedCall(name, bits, dtype)
        mine, expected = call.tensors(), call.tensors()
        symbol = NAMES_32[name].format(suffix) if bits == 32 else f"c{name}_8bit_blockwise_grad_{suffix}"
        call.c_function(cuda_once, symbol, *mine)
        call.operator(reference, *expected)
        assert not torch.equal(mine[0], call.p)
        for one, other in zip(mine, expected):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_published_c_functions_know_the_limit(cuda_once):
    call = PublishedCall("adam", 32, max_unorm=0.01)
    mine, expected = call.tensors(), call.tensors()
    call.c_function(cuda_once, "cadam32bit_grad_fp32", *mine)
    call.operator(reference, *expected)
    assert mine[3].item() > 0.0
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_published_c_functions_do_nothing_without_elements(cuda_once):
    for name in ("cadam32bit_grad_fp32", "cadam_8bit_blockwise_grad_fp32"):
        call = PublishedCall("adam", 32 if "32bit" in name else 8)
        for n in (0, -5):
            call.n, tensors = n, call.tensors()
            call.c_function(cuda_once, name, *tensors)
            assert torch.equal(tensors[0], call.p)


def test_paged_tensors(cuda_once, no_streams, monkeypatch):
    """Of the package, with the functions of this library."""
    monkeypatch.setattr(paging, "lib", CudaBNBNativeLibrary(cuda_once._lib))
    case = make_case("adam", {}, [5000], 8)
    expected = case.stepped_by(reference.optimizer_step)
    for i, moment in enumerate(case.moments):
        case.moments[i] = paging.get_paged(5000, dtype=torch.uint8)
        paging.fill(case.moments[i], 0xA5)
        assert (case.moments[i] == 0xA5).all()
        case.moments[i].copy_(moment)
        paging.prefetch_tensor(case.moments[i])
    native.optimizer_step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **case.settings)
    paging.wait_for_pages(case.moments)
    assert_same(case, expected)
    a, b = (paging.get_paged(3, 1000) for _ in range(2))
    paging.fill(a, 3.0)
    paging.fill(b, 0.5)
    paging._mul(a, b)
    assert (a == 1.5).all()


def test_published_functions_on_managed_memory(cuda_once):
    cuda_once.cget_managed_ptr.restype = ct.c_void_p
    n, none = ct.c_int64(1000), None
    a, b, codes = (cuda_once.cget_managed_ptr(ct.c_size_t(4000)) for _ in range(3))
    floats, bytes_ = ((kind * 1000).from_address(address) for kind, address in ((ct.c_float, a), (ct.c_uint8, codes)))
    cuda_once.cprefetch(ct.c_void_p(a), ct.c_size_t(4000), ct.c_int32(0))
    cuda_once.carange_fp32(ct.c_void_p(a), none, ct.c_float(0.0), n)
    assert list(floats) == list(range(1000))
    cuda_once.cfill_fp32(ct.c_void_p(b), none, ct.c_float(0.5), n)
    cuda_once.c_mul_fp32(ct.c_void_p(a), ct.c_void_p(b), ct.c_float(0.0), n)
    assert list(floats) == [i / 2 for i in range(1000)]
    cuda_once.cfill_uint8(ct.c_void_p(codes), none, ct.c_uint8(200), n)
    assert list(bytes_) == [200] * 1000
    for to in (0, -1):
        assert cuda_once.bnb_cuda_prefetch_managed(ct.c_void_p(a), ct.c_int64(4000), ct.c_int32(to), ct.c_int32(cuda_once.where[0]), None) == 0
    for pointer, size in ((None, 4000), (ct.c_void_p(a), -1)):
        assert cuda_once.bnb_cuda_prefetch_managed(pointer, ct.c_int64(size), ct.c_int32(0), ct.c_int32(cuda_once.where[0]), None) == 1
    for address in (a, b, codes):
        assert cuda_once.bnb_cuda_free_managed(ct.c_void_p(address)) == 0
