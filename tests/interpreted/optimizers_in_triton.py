"""Optimizer steps in Triton against the reference: parameters, moments, codes and statistics bit for bit, norms up to the order of their sums."""

import gpu_rounding  # noqa: F401  (before anything is computed)
from helpers import FLOAT_DTYPES, grid
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from test_cpu_optimizers import EXTREMES, SIGNED, UNSIGNED, VARIANTS, Case, assert_same, make_case, variants
import torch

from bitsandbytes.backends.default import optimizers as reference
from bitsandbytes.backends.triton import optimizers

SINGLE = dict(beta1=0.9, beta2=0.99, beta3=0.999, alpha=4.0, eps=1e-8, step=3, lr=1e-2, weight_decay=0.1, gnorm_scale=0.5)


def assert_steps_like_the_reference(case: Case) -> None:
    assert_same(case.stepped_by(optimizers.optimizer_step), case.stepped_by(reference.optimizer_step))


@variants
@pytest.mark.parametrize("bits", [32, 8])
def test_every_algorithm_and_element_type(algorithm, options, bits):
    for i, dtype in enumerate(FLOAT_DTYPES):
        case = make_case(algorithm, options, [0, 1, 257, 1100], bits, dtype, FLOAT_DTYPES[i - 1], step=1 + 3 * (i > 0))
        assert_steps_like_the_reference(case)


@given(
    variant=st.sampled_from(VARIANTS),
    length=st.integers(0, 1100),
    bits=st.sampled_from([32, 8]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    step=st.integers(1, 10**6),
    numbers=st.fixed_dictionaries({
        "lr": st.floats(0.0, 10.0), "beta1": st.floats(0.0, 0.9999), "beta3": st.floats(0.0, 0.99999), "alpha": st.floats(0.0, 10.0),
        "eps": st.sampled_from([0.0, 1e-15, 1e-8, 1.0]), "weight_decay": st.sampled_from([0.0, 1e-4, 0.5, 2.0]),
        "gnorm_scale": st.sampled_from([1.0, -1.0, 0.3, 0.0]), "skip_zeros": st.booleans(), "decoupled_weight_decay": st.booleans(),
    }),
    seeds=st.lists(st.integers(0, 2**32 - 1), max_size=1),
)  # fmt: skip
@settings(max_examples=60)
def test_any_settings(variant, length, bits, dtype, step, numbers, seeds):
    assert_steps_like_the_reference(make_case(*variant, [length], bits, dtype, seed=length, step=step, seeds=seeds, **numbers))


@variants
@grid(bits=(32, 8), skip_zeros=(False, True))
def test_special_values(algorithm, options, bits, skip_zeros):
    values = torch.tensor(EXTREMES)
    case = make_case(algorithm, options, [2000], bits, torch.bfloat16 if skip_zeros else torch.float32, skip_zeros=skip_zeros)
    for tensor in (*case.p, *case.g, *(case.moments if bits == 32 else case.absmax)):
        places = torch.rand(tensor.shape) < 0.03
        tensor[places] = values[torch.randint(0, len(values), (int(places.sum()),))].to(tensor.dtype)
    assert_steps_like_the_reference(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_of_everything_a_float_can_be(dtype):
    case = make_case("momentum", {"beta2": 0.0}, [20_000], 32, dtype, torch.float32, weight_decay=0.0, lr=1.0, seeds=[4_000_000_000], step=1)
    case.p[0].zero_()
    case.g[0].copy_(torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32).view(torch.float32))
    case.g[0][::2] = torch.randn(10_000) * 2.0 ** torch.randint(-26, 3, (10_000,))
    assert_steps_like_the_reference(case)


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED, torch.linspace(-1, 1, 256), torch.linspace(0, 1, 257)[1:]])
def test_codes_keep_the_sign_of_every_value(code):
    values = torch.cat([code, (code[:-1] + code[1:]) / 2, torch.randn(700) * 2.0 ** torch.randint(-130, 1, (700,))])
    values = torch.cat([values, -values]).clamp(-1, 1)
    case = make_case("momentum", {"beta2": 0.0}, [values.numel()], 8, step=1)
    case.g[0].copy_(values)
    case.qmaps = [code]
    assert_steps_like_the_reference(case)


def test_a_block_without_gradients_keeps_its_codes():
    case = make_case("adam", {}, [1024], 8, skip_zeros=True)
    case.g[0][256:512] = 0.0
    for moment in case.moments:
        moment.clamp_(20, 200)  # without its largest value a block would get another scale if it were encoded anew
    assert_steps_like_the_reference(case)
    stepped = case.stepped_by(optimizers.optimizer_step)
    for before, after in zip(case.moments, stepped.moments):
        assert torch.equal(before[256:512], after[256:512]) and not torch.equal(before, after)


def test_which_parameters_share_a_launch():
    memory, g = torch.zeros(1000), [torch.zeros(5), torch.zeros(5).half(), torch.zeros(5), torch.zeros(0)]
    apart = [memory[:400], memory[400:688], memory[688:992], memory[:0]]
    assert optimizers._batches(apart, g, one_by_one=False) == [[0, 2], [1]]
    assert optimizers._batches(apart, g, one_by_one=True) == [[0], [1], [2], [3]]
    odd = [memory[:400], memory[400:701], memory[701:]]
    assert optimizers._batches(odd, g[2:3] * 3, one_by_one=False) == [[0], [1, 2]]
    overlapping = [memory[:400], memory[399:], memory[:0]]
    interleaved = [memory.view(500, 2)[:, 0], memory.view(500, 2)[:, 1], memory[:0]]
    for p in (overlapping, interleaved):
        assert optimizers._batches(p, g[:3], one_by_one=False) == [[0], [1], [2]]


@pytest.mark.parametrize("algorithm", ["lamb", "lars"])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_limited_update(algorithm, bits):
    options = {} if algorithm == "lamb" else {"beta2": 0.0}
    for max_unorm in (1e-3, 1e6):
        case = make_case(algorithm, options, [0, 700, 3000], bits, max_unorm=max_unorm, lr=0.1)
        case.p.append(torch.zeros(5))
        extra = make_case(algorithm, options, [5], bits, max_unorm=max_unorm)
        case.g += extra.g
        case.moments += extra.moments
        case.absmax += extra.absmax
        case.unorm += extra.unorm
        actual, expected = case.stepped_by(optimizers.optimizer_step), case.stepped_by(reference.optimizer_step)
        for one, other in zip((*actual.p, *actual.unorm), (*expected.p, *expected.unorm)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        for one, other in zip(actual.moments, expected.moments):
            assert torch.equal(one, other)


def test_parameters_gradients_and_moments_with_gaps():
    case = make_case("adam", {}, [(20, 30)], 32)
    expected = case.stepped_by(reference.optimizer_step)
    gaps = Case(
        *([torch.stack([t, t], -1)[..., 0] for t in ts] for ts in (case.p, case.g, case.moments, case.absmax, case.qmaps, case.unorm)), case.settings
    )
    transposed = gaps.p[0] = case.p[0].t().contiguous().t()
    version = transposed._version
    optimizers.optimizer_step(gaps.p, gaps.g, gaps.moments, [], [], [], **case.settings)
    assert transposed._version > version
    assert_same(
        Case([transposed.contiguous()], [], [m.contiguous() for m in gaps.moments], [], [], [], {}),
        Case(expected.p, [], expected.moments, [], [], [], {}),
    )


@grid(algorithm=("adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad", "lamb", "lars"), skip_zeros=(False, True))
def test_the_published_operators(algorithm, skip_zeros):
    case = make_case(algorithm, {"beta2": 0.0}, [600], 32, torch.bfloat16)
    case8 = make_case(algorithm, {"beta2": 0.0}, [600], 8, torch.bfloat16)

    def states(tensors):
        """state1 and state2 of the published operators: AdEMAMix has two means in one tensor."""
        tensors = [tensor.clone() for tensor in tensors]
        tensors = [torch.stack(tensors[:2]), tensors[2]] if algorithm == "ademamix" else tensors
        return (*tensors, None)[:2]

    results = []
    for module in (optimizers, reference):
        p, s, u = case.p[0].clone(), states(case.moments), torch.zeros(1)
        module.optimizer_update_32bit(
            algorithm, case.g[0], p, *s, u, 0.0, 1.0, SINGLE["beta1"], SINGLE["beta2"], SINGLE["beta3"], SINGLE["alpha"], SINGLE["eps"],
            SINGLE["weight_decay"], SINGLE["step"], SINGLE["lr"], SINGLE["gnorm_scale"], skip_zeros,
        )  # fmt: skip
        p8, s8, a8 = case8.p[0].clone(), states(case8.moments), states(case8.absmax)
        module.optimizer_update_8bit_blockwise(
            algorithm, case8.g[0], p8, *s8, SINGLE["beta1"], SINGLE["beta2"], SINGLE["beta3"], SINGLE["alpha"], SINGLE["eps"], SINGLE["step"],
            SINGLE["lr"], SIGNED, UNSIGNED if s8[1] is not None else None, *a8, SINGLE["weight_decay"], SINGLE["gnorm_scale"], skip_zeros,
        )  # fmt: skip
        results.append([tensor for tensor in (p, *s, p8, *s8, *a8) if tensor is not None])
    assert_same(*(Case(tensors, [], [], [], [], [], {}) for tensors in results))
