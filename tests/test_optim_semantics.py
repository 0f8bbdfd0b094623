"""What the optimizers compute: torch.optim and the papers, step by step over hundreds of steps, and every option that changes it."""

from helpers import DEVICE, FLOAT_DTYPES, assert_same_bits, bell, from_numpy, grid, seeded
from hypothesis import given
from hypothesis import strategies as st
from lion_pytorch import Lion as ReferenceLion
import numpy as np
import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.backends.default.rounding import mix, random_16_bits, round_stochastically
from bitsandbytes.optim.algorithms import alpha_at, beta3_at

ops = torch.ops.bitsandbytes
LR = 1e-2


def lion(p, **kwargs):
    return ReferenceLion(p, decoupled_weight_decay=False, **kwargs)


# name -> (ours, reference, exact to rounding). What torch.optim calls otherwise is said twice.
T = torch.optim
CASES = {
    "Adam": (lambda p: optim.Adam(p, LR), lambda p: T.Adam(p, LR)),
    "Adam coupled": (lambda p: optim.Adam(p, LR, weight_decay=0.1, decoupled_weight_decay=False), lambda p: T.Adam(p, LR, weight_decay=0.1)),
    "Adam decoupled": (lambda p: optim.Adam(p, LR, weight_decay=0.1), lambda p: T.AdamW(p, LR, weight_decay=0.1)),
    "Adam amsgrad": (lambda p: optim.Adam(p, LR, (0.9, 0.95), amsgrad=True), lambda p: T.Adam(p, LR, (0.9, 0.95), amsgrad=True)),
    "Adam large eps": (lambda p: optim.Adam(p, LR, eps=0.1), lambda p: T.Adam(p, LR, eps=0.1)),
    "AdamW": (lambda p: optim.AdamW(p, LR), lambda p: T.AdamW(p, LR)),
    "AdamW amsgrad maximize": (
        lambda p: optim.AdamW(p, LR, weight_decay=0.1, amsgrad=True, maximize=True),
        lambda p: T.AdamW(p, LR, weight_decay=0.1, amsgrad=True, maximize=True),
    ),
    "LAMB without limit": (lambda p: optim.LAMB(p, LR, weight_decay=0.1, max_unorm=0.0), lambda p: T.AdamW(p, LR, weight_decay=0.1)),
    "LAMB coupled": (lambda p: optim.LAMB(p, LR, weight_decay=0.1, adam_w_mode=False, max_unorm=0.0), lambda p: T.Adam(p, LR, weight_decay=0.1)),
    "AdEMAMix": (lambda p: optim.AdEMAMix(p, LR, weight_decay=0.1), lambda p: optim.ademamix._ReferenceAdEMAMix(p, LR, weight_decay=0.1)),
    "AdEMAMix scheduled": (
        lambda p: optim.AdEMAMix(p, LR, t_alpha=50, t_beta3=50), lambda p: optim.ademamix._ReferenceAdEMAMix(p, LR, t_alpha=50, t_beta3=50),
    ),
    "AdEMAMix one schedule": (lambda p: optim.AdEMAMix(p, LR, t_beta3=50), lambda p: optim.ademamix._ReferenceAdEMAMix(p, LR, t_beta3=50)),
    "Lion": (lambda p: optim.Lion(p, 1e-3, weight_decay=0.1), lambda p: lion(p, lr=1e-3, weight_decay=0.1)),
    "SGD": (lambda p: optim.SGD(p, LR), lambda p: T.SGD(p, LR)),
    "SGD momentum": (lambda p: optim.SGD(p, LR, 0.9, weight_decay=0.1), lambda p: T.SGD(p, LR, 0.9, weight_decay=0.1)),
    "SGD dampening": (lambda p: optim.SGD(p, LR, 0.9, 0.5), lambda p: T.SGD(p, LR, 0.9, 0.5)),
    "SGD dampening only": (lambda p: optim.SGD(p, LR, 0.0, 0.5), lambda p: T.SGD(p, LR, 0.0, 0.5)),
    "SGD nesterov": (lambda p: optim.SGD(p, LR, 0.9, nesterov=True), lambda p: T.SGD(p, LR, 0.9, nesterov=True)),
    "SGD maximize": (lambda p: optim.SGD(p, LR, 0.9, weight_decay=0.1, maximize=True), lambda p: T.SGD(p, LR, 0.9, weight_decay=0.1, maximize=True)),
    "LARS without limit": (lambda p: optim.LARS(p, LR, 0.9, nesterov=True, max_unorm=0.0), lambda p: T.SGD(p, LR, 0.9, nesterov=True)),
    "LARS": (lambda p: optim.LARS(p, 1.0, 0.9, weight_decay=0.1), lambda p: optim.PytorchLARS(p, 1.0, 0.9, weight_decay=0.1)),
    "LARS without momentum": (lambda p: optim.LARS(p, 1.0), lambda p: optim.PytorchLARS(p, 1.0)),
    "RMSprop": (lambda p: optim.RMSprop(p, 1e-3, weight_decay=0.1), lambda p: T.RMSprop(p, 1e-3, weight_decay=0.1)),
    "RMSprop momentum": (lambda p: optim.RMSprop(p, 1e-3, momentum=0.9), lambda p: T.RMSprop(p, 1e-3, momentum=0.9)),
    "RMSprop centered": (lambda p: optim.RMSprop(p, 1e-3, 0.9, centered=True), lambda p: T.RMSprop(p, 1e-3, 0.9, centered=True)),
    "RMSprop both": (
        lambda p: optim.RMSprop(p, 1e-3, momentum=0.5, centered=True, maximize=True),
        lambda p: T.RMSprop(p, 1e-3, momentum=0.5, centered=True, maximize=True),
    ),
    "RMSprop alpha 0": (lambda p: optim.RMSprop(p, 1e-3, alpha=0.0), lambda p: T.RMSprop(p, 1e-3, alpha=0.0)),
    "Adagrad": (lambda p: optim.Adagrad(p, LR, weight_decay=0.1), lambda p: T.Adagrad(p, LR, weight_decay=0.1)),
    "Adagrad decay and start": (
        lambda p: optim.Adagrad(p, LR, lr_decay=0.1, initial_accumulator_value=0.5),
        lambda p: T.Adagrad(p, LR, lr_decay=0.1, initial_accumulator_value=0.5),
    ),
}  # fmt: skip

# torch's names of what the first states hold
TORCH_STATES = ("exp_avg", "momentum_buffer", "square_avg", "sum", "m1_m2")


def gradients(shape, steps, seed=0):
    generator = seeded(seed)
    return (torch.randn(shape, generator=generator) * 0.1 for _ in range(steps))


@pytest.fixture
def one_thread():
    """These tensors are small: threads would only wait for each other."""
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------------------------------- torch.optim
@grid(case=CASES)
def test_300_steps_in_32_bits_are_those_of_the_reference(one_thread, case):
    ours, theirs = CASES[case]
    p = torch.nn.Parameter(bell(700).view(20, 35))
    q = torch.nn.Parameter(p.detach().double())
    mine, reference = ours([p]), theirs([q])
    for g in gradients(p.shape, 300):
        p.grad, q.grad = g, g.double()
        mine.step()
        reference.step()
        off = (p - q).abs() > 3e-5 + 3e-5 * q.abs()
        # beside a change of Lion's sign, an element may go the other way for one step in single precision
        assert off.sum() <= (5 if case == "Lion" else 0), f"{off.sum()} elements differ"
    for name in TORCH_STATES:
        if name in reference.state[q] and not ("RMSprop" in case and name == "momentum_buffer"):
            torch.testing.assert_close(mine.state[p]["state1"], reference.state[q][name].float(), rtol=1e-4, atol=1e-5)


@grid(case=[c for c in CASES if "Lion" not in c], dtype=[torch.bfloat16, torch.float16])
def test_a_half_precision_step_is_the_reference_rounded_once(one_thread, case, dtype):
    """Step by step from equal parameters: no more than one unit in the last place, in few elements, over 100 steps."""
    ours, theirs = CASES[case]
    p = torch.nn.Parameter(bell(700).to(dtype))
    q = torch.nn.Parameter(p.detach().double())
    mine, reference = ours([p]), theirs([q])
    for g in gradients(p.shape, 100):
        p.grad = g.to(dtype)
        q.grad = p.grad.double()
        mine.step()
        reference.step()
        rounded = q.detach().to(dtype)
        torch.testing.assert_close(p.detach(), rounded, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (p != rounded).sum() <= 3
        q.data.copy_(p.data)


# 8-bit averages that move by 1 % a step are held by nearest rounding, and Lion sees only their sign
@grid(case=[c for c in CASES if "Lion" not in c and c not in ("RMSprop centered", "RMSprop both")])
def test_8_bit_training_gets_as_near_to_the_target(one_thread, case):
    ours, _ = CASES[case]
    target = bell(4096, seed=9)
    distances = {}
    sign = -1.0 if "maximize" in case else 1.0
    for bits in (8, 32):
        p = torch.nn.Parameter(bell(4096))
        optimizer = ours([p])
        optimizer.args.optim_bits = bits
        for noise in gradients(p.shape, 150):
            p.grad = sign * ((p.detach() - target) * 0.1 + noise * 0.1)
            optimizer.step()
        assert optimizer.state[p]["state1"].dtype == {8: torch.uint8, 32: torch.float32}[bits]
        distances[bits] = (p - target).norm().item()
    assert distances[8] < 1.15 * distances[32]


def test_centered_rmsprop_has_32_bit_states_only():
    p = torch.nn.Parameter(bell(4096))
    for make in (lambda: optim.RMSprop8bit([p], centered=True), lambda: optim.RMSprop([p], centered=True, optim_bits=8)):
        with pytest.raises(NotImplementedError, match="32-bit"):
            make()
    optimizer = optim.RMSprop([{"params": [p], "optim_bits": 8}], centered=True)
    p.grad = bell(4096, seed=2)
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.float32


@grid(bits=[8, 32])
def test_lamb_without_bias_correction(bits):
    p = torch.nn.Parameter(bell(4096))
    optimizer = optim.LAMB([p], LR, bias_correction=False, max_unorm=0.0, optim_bits=bits)
    p.grad = bell(4096, seed=3)
    before = p.detach().clone()
    optimizer.step()
    update = 0.1 * p.grad / ((0.001 * p.grad**2).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), before - LR * update)


@grid(cls=["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_trust_ratio_limits_the_update_in_both_sizes_of_state(cls):
    """The update, without learning rate, has at most max_unorm times the norm of the parameter."""
    bound, kwargs = (0.02, dict(momentum=0.9)) if cls.startswith("LARS") else (1.0, {})
    p = torch.nn.Parameter(bell(8192) * 1e-3)
    optimizer = getattr(optim, cls)([p], lr=0.1, **kwargs)
    for seed in range(3):
        before = p.detach().clone()
        p.grad = bell(8192, seed=seed)
        optimizer.step()
        torch.testing.assert_close((p - before).norm(), 0.1 * bound * before.norm(), rtol=1e-3, atol=0)
        assert optimizer.state[p]["unorm_vec"].item() > bound * before.norm()


@grid(cls=["Adam", "AdamW8bit", "Lion", "AdEMAMix", "RMSprop8bit", "Adagrad", "SGD"])
def test_max_unorm_and_skip_zeros_hold_for_every_algorithm(cls):
    kwargs = dict(lr=0.1, momentum=0.9) if cls == "SGD" else dict(lr=0.1)
    p = torch.nn.Parameter(bell(8192))
    optimizer = getattr(optim, cls)([p], **kwargs)
    optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.01, True
    optimizer.param_groups[0]["weight_decay"] = 0.0
    p.grad = bell(8192, seed=3)
    p.grad[::2] = 0.0
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p.detach()[::2], before[::2])
    torch.testing.assert_close((p - before).norm(), 0.1 * 0.01 * before.norm(), rtol=1e-3, atol=0)


def test_skip_zeros_is_an_argument_of_every_optimizer():
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = optim.AdamW([p], weight_decay=0.5, skip_zeros=True)
    p.grad = torch.tensor([0.0, 1.0] * 5)
    optimizer.step()
    assert (p[::2] == 1.0).all() and (p[1::2] != 1.0).all()


def test_pytorch_lars_without_momentum():
    p = torch.nn.Parameter(bell(100))
    optimizer = optim.PytorchLARS([p], lr=1.0, weight_decay=0.1)
    p.grad = bell(100, seed=2)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close((p - before).norm(), 0.02 * before.norm())


@given(step=st.integers(1, 400), duration=st.one_of(st.none(), st.integers(1, 300)))
def test_ademamix_schedules_rise_to_their_ends_and_stay(step, duration):
    beta3, alpha = beta3_at(step, 0.9, 0.9999, duration), alpha_at(step, 5.0, duration)
    if not duration or step >= duration:
        assert (beta3, alpha) == (0.9999, 5.0)
    else:
        assert 0.9 <= beta3 <= 0.9999 and alpha == pytest.approx(5.0 * step / duration)
        assert beta3_at(step + 1, 0.9, 0.9999, duration) > beta3


# ------------------------------------------------------------------------------------------------------------- values that are none
@grid(cls=["Adam8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "AdEMAMix8bit", "Adagrad8bit", "LAMB8bit"], value=[torch.nan, torch.inf])
def test_a_bad_gradient_element_spoils_itself_alone(cls, value):
    p = torch.nn.Parameter(bell(8192))
    optimizer = getattr(optim, cls)([p], **(dict(lr=1e-3, momentum=0.9) if "SGD" in cls else {}))
    for step, g in enumerate(gradients(p.shape, 4)):
        if step == 1:
            g[300] = value
        p.grad = g
        optimizer.step()
    assert (~p.isfinite()).sum() <= (8192 if cls == "LAMB8bit" and value != value else 1)
    for key, tensor in optimizer.state[p].items():
        assert key in ("step", "unorm_vec") or tensor.dtype == torch.uint8 or tensor.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- stochastic rounding
@grid(cls=["AdamW", "AdamW8bit", "Lion", "AdEMAMix8bit"], dtype=[torch.bfloat16, torch.float16])
def test_stochastic_rounding_moves_what_rounding_to_nearest_does_not(cls, dtype):
    """100 steps of 1e-4 from 1 in bfloat16, where a unit in the last place is 4e-3 below: the mean must move by 0.01."""
    means = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(8192, dtype=dtype))
        optimizer = getattr(optim, cls)([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic, **({"alpha": 0.0} if "Mix" in cls else {}))
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means[stochastic] = p.float().mean().item()
    assert means[True] == pytest.approx(0.99, abs=3e-4)
    if dtype == torch.bfloat16:
        assert means[False] == 1.0


def trained(seed, params):
    optimizer = optim.AdamW(params, lr=1e-4, stochastic_rounding=True, seed=seed)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = bell(p.numel(), seed=step + 10 * i).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def test_stochastic_rounding_is_given_by_its_seed():
    def params():
        return [torch.nn.Parameter(bell(1000).bfloat16()) for _ in range(2)]

    first, again, other = trained(1, params()), trained(1, params()), trained(2, params())
    for a, b in zip(first, again):
        assert_same_bits(a, b)
    assert not torch.equal(first[0], other[0])


def test_parameters_do_not_round_alike():
    params = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.AdamW(params, lr=1e-3, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*params)


@grid(seed=[-1, 2**32])
def test_a_seed_has_32_bits(seed):
    with pytest.raises(ValueError, match="seed"):
        optim.AdamW([torch.nn.Parameter(torch.ones(4))], seed=seed)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rounding_goes_to_a_neighbour_and_keeps_what_fits(bits, dtype, seed):
    value = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    rounded = round_stochastically(value, dtype, seed, 1)
    assert_same_bits(rounded.isnan(), value.isnan())
    finite = value.isfinite()
    nearest = value.to(dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    below, above = torch.nextafter(nearest, -infinity), torch.nextafter(nearest, infinity)
    assert ((rounded == nearest) | (rounded == below) | (rounded == above))[finite].all()
    fits = finite & (nearest.float() == value)
    assert_same_bits(rounded[fits], nearest[fits])


@grid(dtype=[torch.bfloat16, torch.float16], value=[1.0003, -3.3e-3, 2.0**-20 * 1.1, 3e-8, 6.1e-5, 1e4 + 1.7])
def test_rounding_is_unbiased(dtype, value):
    values = torch.full((1 << 16,), value)
    rounded = round_stochastically(values, dtype, 7, 3).double()
    unit = (rounded.max() - rounded.min()).item()
    assert abs(rounded.mean().item() - values[0].double().item()) < 0.01 * unit + 1e-12
    assert rounded.unique().numel() == 2


def test_random_numbers_are_those_of_the_description():
    """Written out for one element, for other backends to compare with."""

    def lowbias32(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x

    assert [mix(x) for x in (0, 1, 12345)] == [lowbias32(x) for x in (0, 1, 12345)]
    random = random_16_bits(torch.Size([3, 5]), seed=42, step=7, device=torch.device(DEVICE))
    key = lowbias32((lowbias32(42) + 7) & 0xFFFFFFFF)
    assert random.view(-1).tolist() == [lowbias32(i ^ key) >> 16 for i in range(15)]


# ----------------------------------------------------------------------------------------------------------------- the operator
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="without fused multiply-add the last bit differs")
@grid(n=[1, 7, 1000])
def test_an_adam_step_is_made_of_the_documented_operations(n):
    """fma, multiplication, division and square root in float32, each rounded once, in the documented order; in NumPy, bit for bit."""

    def f32(x):
        return np.asarray(x, dtype=np.float32)

    def fma(a, b, c):  # exact but for double rounding, which these values do not meet
        return f32(np.float64(a) * np.float64(b) + np.float64(c))

    b1, b2, wd, eps, step = 0.9, 0.99, 0.1, 1e-8, 3
    p, g, m, v = (bell(n, seed=i) for i in range(4))
    v = v.abs()
    state = [m.clone(), v.clone()]
    value = p.clone()
    ops.optimizer_step([value], [g], state, [], [], [], "adam", step, LR, b1, b2, 0.0, 0.0, eps, wd)
    p, g, m, v = (x.cpu().numpy() for x in (p, g, m, v))
    mean = fma(f32(1 - b1), g, m * f32(b1))
    square = fma(f32(1 - b2) * g, g, v * f32(b2))
    c1, c2 = 1 - b1**step, (1 - b2**step) ** 0.5
    direction = mean / (np.sqrt(square) + f32(c2 * eps))
    expected = fma(f32(-LR * (c2 / c1)), direction, p * f32(1 - LR * wd))
    for actual, wanted in zip((*state, value), (mean, square, expected)):
        assert_same_bits(actual, from_numpy(wanted))


def arguments(count=2, n=300, bits=32, algorithm="adam", moments=2, **settings):
    qmap = torch.linspace(-1, 1, 256)
    dtype = torch.float32 if bits == 32 else torch.uint8
    scalars = dict(algorithm=algorithm, step=1, lr=LR, beta1=0.9, beta2=0.99, beta3=0.0, alpha=0.0, eps=1e-8, weight_decay=0.0, **settings)
    p, g = ([bell(n, seed=i + j).clone() for i in range(count)] for j in (0, 50))
    state = [torch.zeros(n, dtype=dtype) for _ in range(count * moments)]
    absmax = [torch.zeros(-(-n // 256)) for _ in state] if bits == 8 else []
    return [p, g, state, absmax, [qmap] * moments if bits == 8 else [], []], scalars


@grid(bits=[8, 32])
def test_operator_passes_opcheck(bits):
    lists, scalars = arguments(bits=bits)
    torch.library.opcheck(ops.optimizer_step, tuple(lists), scalars, test_utils=("test_schema", "test_faketensor"))


@grid(
    change=[
        lambda l, s: l[1].pop(), lambda l, s: l[2].pop(), lambda l, s: l[3].pop(), lambda l, s: l[4].pop(), lambda l, s: s.update(max_unorm=1.0),
        lambda l, s: s.update(seeds=[1]), lambda l, s: s.update(step=0), lambda l, s: l[1].__setitem__(0, torch.zeros(3)),
        lambda l, s: l[2].__setitem__(0, torch.zeros(3, dtype=torch.uint8)), lambda l, s: l[2].__setitem__(0, torch.zeros(300)),
        lambda l, s: l[3].__setitem__(0, torch.zeros(1)), lambda l, s: l[3].__setitem__(0, torch.zeros(2, dtype=torch.float64)),
        lambda l, s: l[4].__setitem__(0, torch.zeros(16)), lambda l, s: l[0].__setitem__(1, torch.zeros(300, dtype=torch.bfloat16)),
        lambda l, s: l[0].__setitem__(1, torch.zeros(300, dtype=torch.float64)), lambda l, s: s.update(algorithm="adamw"),
        lambda l, s: s.update(nesterov=True), lambda l, s: s.update(centered=True), lambda l, s: s.update(algorithm="lion", amsgrad=True),
    ]
)  # fmt: skip
def test_operator_refuses_what_does_not_fit(change):
    lists, scalars = arguments(bits=8)
    change(lists, scalars)
    before = lists[0][0].clone()
    with pytest.raises((RuntimeError, ValueError), match="optimizer_step"):
        ops.optimizer_step(*lists, **scalars)
    assert_same_bits(lists[0][0], before)


@grid(dtype=FLOAT_DTYPES, gradient=FLOAT_DTYPES)
def test_gradients_may_be_of_another_type_than_the_parameter(dtype, gradient):
    lists, scalars = arguments()
    lists[0], lists[1] = [p.to(dtype) for p in lists[0]], [g.to(gradient) for g in lists[1]]
    plain, _ = arguments()
    plain[0], plain[1] = [p.to(dtype).float() for p in plain[0]], [g.to(gradient).float() for g in plain[1]]
    ops.optimizer_step(*lists, **scalars)
    ops.optimizer_step(*plain, **scalars)
    for a, b in zip(lists[0], plain[0]):
        assert_same_bits(a, b.to(dtype))


def test_no_parameters_are_no_step():
    ops.optimizer_step([], [], [], [], [], [], **arguments()[1])
