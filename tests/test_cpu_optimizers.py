"""Optimizer steps of the native library, on every instruction set, against the reference in plain PyTorch.

Parameters, moments, codes and their statistics are compared bit for bit. Only the norms that ``max_unorm`` needs are sums whose order differs; on
the native side they must not depend on the instruction set or the number of threads.
"""

import ctypes as ct
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cpu import SETS, assert_same_floats, lib, library  # noqa: F401  (fixtures among them)
import numpy as np
from optimizer_cases import (
    EXTREMES,
    FLOATS,
    SIGNED,
    UNSIGNED,
    VARIANTS,
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

from bitsandbytes.backends.cpu import optimizers as native
from bitsandbytes.backends.default import optimizers as reference

ops = torch.ops.bitsandbytes
# The fixture only chooses a set, which lasts for all examples.
on_every_set = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def assert_steps_like_the_reference(case: Case) -> None:
    assert_same(case.stepped_by(native.optimizer_step), case.stepped_by(reference.optimizer_step))


# ---------------------------------------------------------------------------------------------------------------------- bit for bit
@variants
@pytest.mark.parametrize("bits", [32, 8])
def test_every_algorithm_at_every_length(lib, algorithm, options, bits):
    lengths = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 511, 512, 777, 4096, 4111]
    assert_steps_like_the_reference(make_case(algorithm, options, lengths, bits))


@variants
@pytest.mark.parametrize("bits", [32, 8])
def test_every_pair_of_element_types(lib, algorithm, options, bits):
    for dtype in FLOATS:
        for g_dtype in FLOATS:
            assert_steps_like_the_reference(make_case(algorithm, options, [700, 256], bits, dtype, g_dtype))


@given(
    variant=st.sampled_from(VARIANTS),
    lengths=st.lists(st.integers(0, 1100), min_size=1, max_size=4),
    bits=st.sampled_from([32, 8]),
    dtype=st.sampled_from(FLOATS),
    g_dtype=st.sampled_from(FLOATS),
    step=st.integers(1, 10**6),
    numbers=st.fixed_dictionaries({
        "lr": st.floats(0.0, 10.0), "beta1": st.floats(0.0, 0.9999), "beta3": st.floats(0.0, 0.99999), "alpha": st.floats(0.0, 10.0),
        "eps": st.sampled_from([0.0, 1e-15, 1e-8, 1.0]), "weight_decay": st.sampled_from([0.0, 1e-4, 0.5, 2.0]),
        "gnorm_scale": st.sampled_from([1.0, -1.0, 0.3, 0.0]), "skip_zeros": st.booleans(), "decoupled_weight_decay": st.booleans(),
    }),
    seeds=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@on_every_set
def test_any_settings(lib, variant, lengths, bits, dtype, g_dtype, step, numbers, seeds, seed):
    numbers["seeds"] = [(seed + 7919 * i) % 2**32 for i in range(len(lengths))] if seeds else []
    assert_steps_like_the_reference(make_case(*variant, lengths, bits, dtype, g_dtype, seed, step=step, **numbers))


@variants
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_special_values(lib, algorithm, options, bits, skip_zeros):
    values = torch.tensor(EXTREMES)
    for dtype in FLOATS:
        case = make_case(algorithm, options, [5000, 256, 40], bits, dtype, skip_zeros=skip_zeros)
        generator = torch.Generator().manual_seed(1)
        for tensor in (*case.p, *case.g, *(case.moments if bits == 32 else case.absmax)):
            places = torch.rand(tensor.shape, generator=generator) < 0.02
            chosen = values[torch.randint(0, len(values), (int(places.sum()),), generator=generator)]
            tensor[places] = chosen.to(tensor.dtype)
        assert_steps_like_the_reference(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_of_everything_a_float_can_be(lib, dtype):
    case = make_case("momentum", {"beta2": 0.0}, [100_000], 32, dtype, torch.float32, weight_decay=0.0, lr=1.0, seeds=[4_000_000_000], step=1)
    case.p[0].zero_()
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    case.g[0].copy_(bits.view(torch.float32))
    case.g[0][::2] = torch.randn(50_000) * 2.0 ** torch.randint(-26, 3, (50_000,))
    assert_steps_like_the_reference(case)
    rounded = case.stepped_by(native.optimizer_step).p[0].float()
    exact = -case.g[0]
    inside = exact.isfinite() & (exact.abs() < 60000.0)
    assert ((rounded != exact) & inside).sum() > 10_000  # it does round


def test_many_elements_use_the_lookup_table_and_few_do_not(lib):
    for lengths in ([40_000, 300], [300]):  # more than 16384 in all, and less
        case = make_case("adam", {}, lengths, 8, step=3)
        for _ in range(3):
            assert_steps_like_the_reference(case)
            case = case.stepped_by(native.optimizer_step)


@pytest.mark.parametrize(
    "code", [SIGNED, UNSIGNED, torch.linspace(-1, 1, 256), torch.linspace(0, 1, 257)[1:]], ids=["signed", "unsigned", "linear", "without zero"]
)
def test_codes_next_to_every_threshold(lib, code):
    thresholds = (code[:-1] + code[1:]) * 0.5
    near = (thresholds.view(torch.int32)[:, None] + torch.arange(-40, 41, dtype=torch.int32)).flatten().view(torch.float32)
    generator = torch.Generator().manual_seed(5)
    anywhere = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-130, 1, (100_000,), generator=generator)
    wanted = torch.cat([near, -near, anywhere]).clamp(-1, 1)
    blocks = -(-len(wanted) // 255)
    values = torch.ones(blocks, 256)  # the first of a block makes its scale 1
    values[:, 1:] = torch.cat([wanted, torch.zeros(blocks * 255 - len(wanted))]).view(blocks, 255)
    case = make_case("lion", {"beta2": 0.0}, [values.numel()], 8, weight_decay=0.0)  # without memory the moment is the gradient
    case.qmaps, case.g = [code.clone()], [values.flatten()]
    assert_steps_like_the_reference(case)
    assert case.stepped_by(native.optimizer_step).absmax[0].eq(1.0).all()


@pytest.mark.parametrize("length", [300, 40_000])
def test_any_ascending_code(lib, length):
    generator = torch.Generator().manual_seed(3)
    codes = [
        torch.randn(256, generator=generator).clamp(-1, 1).sort().values,
        torch.rand(256, generator=generator),
        -torch.rand(256, generator=generator),
        torch.cat([torch.full((128,), -0.0), torch.zeros(64), torch.ones(64)]),
        torch.linspace(-1e-3, 1e-3, 256),
        torch.full((256,), 0.5),
    ]
    for code in codes:
        case = make_case("lion", {}, [length], 8)
        case.qmaps = [code.sort().values]
        assert_steps_like_the_reference(case)


@pytest.mark.parametrize("bits", [32, 8])
def test_layouts_that_are_not_contiguous(lib, bits):
    case = make_case("adam", {}, [(20, 30), (2, 6, 8, 8)], bits)
    case.p = [case.p[0].t().contiguous().t(), case.p[1].contiguous(memory_format=torch.channels_last)]
    case.g = [torch.stack([case.g[0]] * 2, dim=-1)[..., 0], case.g[1].contiguous(memory_format=torch.channels_last)]
    if bits == 8:
        case.moments[0] = case.moments[0].t().contiguous().t()
        case.absmax[0] = torch.stack([case.absmax[0]] * 2, dim=-1)[..., 0]
    assert not case.p[0].is_contiguous() and not case.g[1].is_contiguous()
    after = case.stepped_by(native.optimizer_step)
    assert [tensor.stride() for tensor in after.p] == [tensor.stride() for tensor in case.p]  # else the copies would be of another layout
    assert_same(after, case.stepped_by(reference.optimizer_step))


@pytest.mark.parametrize("name", ["adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad"])
@pytest.mark.parametrize("bits", [32, 8])
def test_published_operators(lib, name, bits):
    n = 1000
    rows = (2, n) if name == "ademamix" else (n,)
    two = name in ("adam", "ademamix")
    generator = torch.Generator().manual_seed(4)

    def state(shape):
        return torch.rand(shape, generator=generator) if bits == 32 else torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def statistics(shape):
        return torch.rand(shape, generator=generator)

    g, p, s1, s2 = torch.randn(n, generator=generator), torch.randn(n, generator=generator), state(rows), state((n,)) if two else None
    a1, a2 = statistics((2, 4) if name == "ademamix" else (4,)), statistics((4,)) if two else None
    results = []
    for backend in (native, reference):
        tensors = [None if t is None else t.clone() for t in (p, s1, s2, a1, a2)]
        if bits == 32:
            backend.optimizer_update_32bit(name, g, *tensors[:3], None, 0.0, 0.0, 0.9, 0.99, 0.999, 2.0, 1e-8, 0.1, 4, 1e-2, 0.5, True)
        else:
            backend.optimizer_update_8bit_blockwise(
                name, g, *tensors[:3], 0.9, 0.99, 0.999, 2.0, 1e-8, 4, 1e-2, SIGNED, UNSIGNED if two else None, *tensors[3:], 0.1, 0.5, True
            )
        results.append(tensors)
    for one, other in zip(*results):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(results[0][0], p)


# ---------------------------------------------------------------------------------------------------------------------- norms
def test_the_limit_on_the_norm(lib):
    for bits in (32, 8):
        for algorithm, options in VARIANTS:
            case = make_case(algorithm, options, [3000, 100, 70_000], bits, max_unorm=0.02)
            case.p[1].zero_()  # is never limited
            mine, expected = case.stepped_by(native.optimizer_step), case.stepped_by(reference.optimizer_step)
            torch.testing.assert_close(mine.unorm, expected.unorm, rtol=1e-5, atol=0, equal_nan=True)
            torch.testing.assert_close(mine.p, expected.p, rtol=1e-5, atol=1e-6, equal_nan=True)
            for one, other in zip(mine.moments + mine.absmax, expected.moments + expected.absmax):
                assert_same_floats(one.float().flatten(), other.float().flatten())  # the limit does not concern them


def test_norms_are_those_of_double_precision(lib):
    case = make_case("momentum", {"beta2": 0.0}, [100_001], max_unorm=1e-3, weight_decay=0.0, step=1, lr=1.0)
    case.g[0].mul_(1e20)  # squares overflow in float32
    after = case.stepped_by(native.optimizer_step)
    norm = np.linalg.norm(case.g[0].double().numpy())
    assert after.unorm[0].item() == np.float32(norm)
    moved = (after.p[0].double() - case.p[0].double()).norm() / case.p[0].double().norm()
    assert abs(moved - 1e-3) < 1e-7


def test_norms_do_not_depend_on_the_set(library):
    before, results = library.bnb_cpu_isa(), []
    for name in SETS:
        if library.bnb_cpu_select_isa(name.encode()) == 0:
            case = make_case("lamb", {"amsgrad": True}, [777, 50_000], 8, torch.bfloat16, max_unorm=0.1)
            results.append(case.stepped_by(native.optimizer_step))
    assert library.bnb_cpu_select_isa(before) == 0
    assert len(results) >= 2
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("max_unorm", [0.0, 0.02])
@pytest.mark.parametrize("bits", [32, 8])
def test_the_number_of_threads_changes_nothing(lib, bits, max_unorm):
    lengths = [200_000, 1, 256, 4096, 30_000, 0, *[300] * 100, 65_537]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            case = make_case("adam", {}, lengths, bits, torch.bfloat16, max_unorm=max_unorm, seeds=list(range(len(lengths))))
            results.append(case.stepped_by(native.optimizer_step))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


# ---------------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("length", [1, 3, 17, 255, 257, 600])
def test_nothing_beyond_the_tensors_is_touched(lib, at_end, bits, length):
    assert_nothing_beyond_is_touched(native.optimizer_step, length, bits, at_end)


def memory_in_use(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is measured by way of /proc")
@pytest.mark.parametrize("max_unorm", [0.0, 0.1])
def test_a_step_needs_no_memory_to_speak_of(max_unorm):
    case = make_case("adam", {}, [4 * 2**20], 8, torch.bfloat16, max_unorm=max_unorm)
    arguments = case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm
    native.optimizer_step(*arguments, **case.settings)  # the tables of the codes are made once
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_in_use("VmRSS:")
    native.optimizer_step(*arguments, **case.settings)
    assert memory_in_use("VmHWM:") - before < 2**20


def test_autograd_learns_of_the_change():
    p = torch.nn.Parameter(torch.ones(8))
    loss = (p * p).sum()
    case = make_case("lion", {}, [8])
    ops.optimizer_step([p], case.g, case.moments, [], [], [], **case.settings)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------------- bad arguments
class Raw(RawStep):
    def call(self, threads: int = 1) -> int:
        return native._optimizer_step(ct.byref(self.tensors), ct.byref(self.settings), threads)


def test_the_c_function_refuses_nonsense(library):
    sound = Raw()
    untouched = sound.case.copy()
    assert sound.call() == 0 and not torch.equal(sound.case.p[0], untouched.p[0])
    for raw in spoilt_steps(Raw):
        assert raw.call() == 1
        assert_same(raw.case, untouched)
    assert Raw().call(threads=-1) == 1
    assert native._optimizer_step(None, ct.byref(sound.settings), 1) == 1 and native._optimizer_step(ct.byref(sound.tensors), None, 1) == 1
    descending, code = Raw(), UNSIGNED.flip(0).contiguous()
    descending.settings.qmaps[1] = code.data_ptr()
    assert descending.call() == 4
    assert_same(descending.case, untouched)


def without_last(tensor):
    return tensor[:-1].clone()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda case: case.g.__setitem__(0, without_last(case.g[0])),
        lambda case: case.moments.__setitem__(1, without_last(case.moments[1])),
        lambda case: case.moments.__setitem__(1, case.moments[1].float()),
        lambda case: case.absmax.__setitem__(0, without_last(case.absmax[0])),
        lambda case: case.absmax.__setitem__(0, case.absmax[0].double()),
        lambda case: case.qmaps.__setitem__(0, SIGNED[:255]),
        lambda case: case.qmaps.__setitem__(0, SIGNED.flip(0)),
        lambda case: case.qmaps.pop(),
        lambda case: case.moments.pop(),
        lambda case: case.p.append(torch.zeros(3)),
        lambda case: case.p.__setitem__(0, case.p[0].double()),
        lambda case: case.settings.update(step=0),
        lambda case: case.settings.update(seeds=[1, 2]),
    ],
)  # fmt: skip
def test_operators_refuse_what_does_not_fit(spoil):
    case = make_case("adam", {}, [600], 8)
    spoil(case)
    before = case.copy()
    with pytest.raises(RuntimeError):
        ops.optimizer_step(case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm, **case.settings)
    for one, other in zip(case.changed(), before.changed(), strict=True):
        assert torch.equal(one, other)
