"""The optimizer classes: names, signatures, what they refuse, the state they make, overrides for single parameters."""

import gc
import inspect
import warnings

from helpers import DEVICE, assert_same_bits, bell, grid
import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import optim

ADAM = "lr=0.001 betas=(0.9,0.999) eps=1e-08 weight_decay={} amsgrad=False optim_bits=32 args=None min_8bit_size=4096 is_paged=False"
ADEMAMIX = (
    "lr=0.001 betas=(0.9,0.999,0.9999) alpha=5.0 t_alpha=None t_beta3=None eps=1e-08 weight_decay=0.01 optim_bits=32 min_8bit_size=4096"
    " is_paged=False"
)
LION = "lr=0.0001 betas=(0.9,0.99) weight_decay=0 optim_bits=32 args=None min_8bit_size=4096 is_paged=False"
SGD = "lr momentum=0 dampening=0 weight_decay=0 nesterov=False optim_bits=32 args=None min_8bit_size=4096"
LAMB = (
    "lr=0.001 bias_correction=True betas=(0.9,0.999) eps=1e-08 weight_decay=0 amsgrad=False adam_w_mode=True optim_bits=32 args=None"
    " min_8bit_size=4096 max_unorm=1.0"
)
RMSPROP = "lr=0.01 alpha=0.99 eps=1e-08 weight_decay=0 momentum=0 centered=False optim_bits=32 args=None min_8bit_size=4096"
ADAGRAD = "lr=0.01 lr_decay=0 weight_decay=0 initial_accumulator_value=0 eps=1e-10 optim_bits=32 args=None min_8bit_size=4096"

_NO_BITS, _NO_PAGES = " optim_bits=32", " is_paged=False"


def family(name, signature, bits_in_variants, paged=False, pages_in_paged=False, base=2):
    """name of a class -> (signature after ``params``, bits, paged, number of states)."""
    rows = {}
    for prefix in ("", "Paged") if paged else ("",):
        for suffix in ("", "8bit", "32bit"):
            text = signature
            if suffix and not bits_in_variants:
                text = text.replace(_NO_BITS, "")
            if prefix and not pages_in_paged:
                text = text.replace(_NO_PAGES, "")
            rows[prefix + name + suffix] = (text.split(), 8 if suffix == "8bit" else 32, bool(prefix), base)
    return rows


CLASSES = {
    **family("Adam", ADAM.format(0), True, paged=True, pages_in_paged=True),
    **family("AdamW", ADAM.format(0.01), True, paged=True),
    **family("AdEMAMix", ADEMAMIX, False, paged=True),
    **family("LAMB", LAMB, False),
    **family("Lion", LION, False, paged=True, base=1),
    **family("SGD", SGD, False, base=1),
    **family("LARS", SGD + " max_unorm=0.02", False, base=1),
    **family("RMSprop", RMSPROP, False, base=1),
    **family("Adagrad", ADAGRAD, True, base=1),
}
CLASSES["Adagrad8bit"][0][CLASSES["Adagrad8bit"][0].index("optim_bits=32")] = "optim_bits=8"


def make(name, params, **kwargs):
    """An optimizer of the class, with a learning rate for those that have no default."""
    if name.startswith(("SGD", "LARS")):
        kwargs = {"lr": 1e-2, "momentum": 0.9, **kwargs}
    return getattr(optim, name)(params, **kwargs)


def parameter(n=8192, seed=1, dtype=torch.float32):
    return torch.nn.Parameter(bell(n, seed).view(64, -1).to(dtype))


def step(optimizer, *params, seed=5):
    for i, p in enumerate(params):
        p.grad = (bell(p.numel(), seed + i) * 0.1).view(p.shape).to(p)
    optimizer.step()


@pytest.fixture
def manager():
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


# -------------------------------------------------------------------------------------------------------------------- constructors
@grid(name=CLASSES)
def test_published_signature(name):
    expected, *_ = CLASSES[name]
    _, params, *rest = inspect.signature(getattr(optim, name).__init__).parameters.values()
    assert params.name == "params"
    positional = [p for p in rest if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", "") for p in positional] == expected
    assert list(inspect.signature(getattr(optim, name)).parameters)[: len(expected) + 1] == ["params", *(word.split("=")[0] for word in expected)]


@grid(name=CLASSES)
def test_published_bases(name):
    cls, (_, _, paged, states) = getattr(optim, name), CLASSES[name]
    base = optim.optimizer.Optimizer2State if states == 2 else optim.optimizer.Optimizer1State
    expected = {
        "AdEMAMix8bit": optim.AdEMAMix, "PagedAdEMAMix": optim.AdEMAMix, "PagedAdEMAMix8bit": optim.AdEMAMix8bit,
        "PagedAdEMAMix32bit": optim.AdEMAMix32bit,
    }.get(name, base)  # fmt: skip
    assert cls.__bases__ == (expected,) and issubclass(cls, optim.optimizer.Optimizer8bit)
    assert cls.__name__ == cls.__qualname__ == name
    assert make(name, [parameter()]).is_paged is paged


@grid(name=CLASSES)
def test_every_class_says_what_it_is(name):
    assert getattr(optim, name).__doc__


@grid(name=CLASSES)
def test_state_has_the_bits_of_the_class_and_the_published_layout(name):
    _, bits, _, states = CLASSES[name]
    p, small = parameter(8192), parameter(4032, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(name, [p, small])
        step(optimizer, p, small)
    rows = (2,) if "AdEMAMix" in name else ()
    expected = {"step": 1}
    for number in range(1, states + 1):
        shape = rows if number == 1 else ()
        expected[f"state{number}"] = ((*shape, 64, 128), torch.uint8 if bits == 8 else torch.float32)
        if bits == 8:
            expected[f"qmap{number}"] = ((256,), torch.float32)
            expected[f"absmax{number}"] = ((*shape, 32), torch.float32)
    if name.startswith(("LAMB", "LARS")):
        expected["unorm_vec"] = ((1,), torch.float32)
    described = {key: (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for key, v in optimizer.state[p].items()}
    assert described == expected
    assert type(optimizer.state[p]["step"]) is int
    assert optimizer.state[small]["state1"].dtype == torch.float32 and "absmax1" not in optimizer.state[small]


@grid(bits=[8, 32], paged=[False, True])
def test_generic_classes_take_bits_and_paging(bits, paged):
    for cls in (optim.Adam, optim.AdamW, optim.Lion, optim.AdEMAMix):
        p = parameter()
        optimizer = cls([p], optim_bits=bits, is_paged=paged)
        step(optimizer, p)
        assert optimizer.state[p]["state1"].dtype == {8: torch.uint8, 32: torch.float32}[bits]
        assert optimizer.is_paged is paged and optimizer.args.optim_bits == bits


def test_min_8bit_size_is_the_smallest_8_bit_state():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (4095, 4096)]
    optimizer = optim.Adam8bit(params)
    step(optimizer, *params)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8]


@grid(name=["Adam8bit", "PagedAdam8bit", "AdamW8bit", "PagedAdamW8bit", "Adam32bit", "LAMB8bit", "Adagrad8bit", "Adagrad32bit"])
def test_choices_that_a_class_does_not_have_are_refused(name):
    refused = {
        "LAMB8bit": [dict(amsgrad=True), dict(max_unorm=0.5), dict(max_unorm=0.0)], "Adagrad8bit": [dict(optim_bits=32)],
        "Adagrad32bit": [dict(optim_bits=8)], "Adam32bit": [dict(optim_bits=8)],
    }.get(name, [dict(amsgrad=True), dict(optim_bits=8)])  # fmt: skip
    for kwargs in refused:
        with pytest.raises(ValueError, match=name):
            make(name, [parameter()], **kwargs)
    make(name, [parameter()])


@grid(name=["Adam", "AdamW8bit", "Lion", "RMSprop", "SGD", "LARS8bit", "Adagrad", "LAMB"])
def test_hyperparameters_out_of_range_are_refused(name):
    for kwargs in (dict(lr=-1.0), dict(lr=float("nan")), dict(weight_decay=-0.1)):
        with pytest.raises(ValueError, match="must not be negative"):
            make(name, [parameter()], **kwargs)
    for key, value in (("betas", (1.0, 0.9)), ("momentum", 1.0), ("alpha", -0.1), ("eps", -1.0), ("lr_decay", -1.0)):
        if key in inspect.signature(getattr(optim, name)).parameters:
            with pytest.raises(ValueError, match="Invalid"):
                make(name, [parameter()], **{key: value})


@grid(name=["SGD", "SGD8bit", "LARS", "PytorchLARS"])
def test_nesterov_needs_momentum_and_no_dampening(name):
    for kwargs in (dict(momentum=0.0), dict(momentum=0.9, dampening=0.1)):
        with pytest.raises(ValueError, match="Nesterov"):
            make(name, [parameter()], nesterov=True, **kwargs)


@grid(name=["Adam", "AdamW8bit", "PagedLion", "SGD8bit", "AdEMAMix"])
def test_removed_and_unknown_arguments_are_refused(name):
    for kwargs in (dict(percentile_clipping=100), dict(block_wise=True), dict(capturable=True)):
        with pytest.raises(TypeError, match=next(iter(kwargs))):
            make(name, [parameter()], **kwargs)


def test_betas_may_be_a_string_where_there_are_two_states():
    p = parameter()
    assert list(optim.Adam([p], betas="(0.8, 0.95)").param_groups[0]["betas"]) == [0.8, 0.95]
    with pytest.raises(TypeError):
        optim.Lion([p], betas="(0.8, 0.95)")


def test_a_third_number_of_bits_is_refused_at_the_first_step():
    p = parameter()
    optimizer = optim.Adam([p], optim_bits=4)
    with pytest.raises(NotImplementedError, match="optim_bits=4"):
        step(optimizer, p)


def test_args_of_the_caller_count():
    p = parameter()
    args = optim.optimizer.MockArgs({"optim_bits": 8, "min_8bit_size": 10, "max_unorm": 0.5, "skip_zeros": True})
    optimizer = optim.Adam([p], args=args)
    step(optimizer, p)
    assert optimizer.args is args and optimizer.state[p]["state1"].dtype == torch.uint8 and optimizer.state[p]["unorm_vec"] > 0


def test_names_of_the_package():
    assert bnb.adam is optim.adam and bnb.optim.optimizer.GlobalOptimManager is optim.GlobalOptimManager
    for submodule in ("adam", "adamw", "ademamix", "lamb", "lars", "lion", "adagrad", "rmsprop", "sgd", "optimizer"):
        assert inspect.ismodule(getattr(optim, submodule))


# --------------------------------------------------------------------------------------------------------------- third-party subclasses
class Legacy(optim.optimizer.Optimizer2State):
    """As optimizers were written for older versions: 11 arguments by position, percentile_clipping and block_wise among them."""

    def __init__(
        self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, optim_bits=32, args=None, min_8bit_size=4096, clip=100, block=True
    ):  # fmt: skip
        super().__init__("adam", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, clip, block, is_paged=False)


class GaLoreLike(Legacy):
    """Steps a projection of the parameter through the hooks of the engine."""

    @torch.no_grad()
    def step(self, closure=None):
        if self.initialized is False:
            self.check_overrides(), self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                state = self.state[p]
                if "step" not in state:
                    state["step"] = 0
                whole, grad = p.data, p.grad
                p.data, p.grad = torch.zeros(p.shape[0], 32), p.grad[:, :32].contiguous()
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)
                update, p.data = p.data, whole
                p.grad = grad
                p.data[:, :32] += update


def test_arguments_of_older_subclasses_are_not_taken_for_others():
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Legacy([p])
    step(optimizer, p)
    assert (optimizer.args.max_unorm, optimizer.args.skip_zeros) == (0.0, False)
    assert p.abs().min() > 0


def test_what_older_arguments_switched_on_is_refused():
    for kwargs in (dict(clip=5), dict(block=False)):
        with pytest.raises(ValueError, match="no longer exist"):
            Legacy([parameter()], **kwargs)


def test_older_positional_arguments_of_the_classes_themselves():
    before = (1e-3, (0.9, 0.999), 1e-8, 0.0, False, 32, None, 4096)
    assert optim.Adam8bit([parameter()], *before, 100, True, True).is_paged is True
    assert optim.Adam([parameter()], *before, 100).is_paged is False
    assert optim.SGD([parameter()], 0.1, 0.9, 0, 0, False, 32, None, 4096, 100, True).args.max_unorm == 0.0
    lamb = (1e-3, True, (0.9, 0.999), 1e-8, 0.0, False, True, 32, None, 4096)
    assert optim.LAMB([parameter()], *lamb, 100, True).args.max_unorm == 1.0
    with pytest.raises(TypeError, match="is_paged"):
        optim.Adam([parameter()], *before, 7)


def test_todays_positional_arguments_are_taken_as_they_are():
    optimizer = optim.optimizer.Optimizer2State("adam", [parameter()], 1e-3, (0.9, 0.999), 1e-8, 0.0, 32, None, 4096, 0.5, True, False)
    assert (optimizer.args.max_unorm, optimizer.args.skip_zeros, optimizer.is_paged) == (0.5, True, False)
    optimizer = optim.optimizer.Optimizer1State("lion", [parameter()], 1e-3, (0.9, 0.99), 0.0, 0.0, 32, None, 4096, 0, False)
    assert (optimizer.args.max_unorm, optimizer.args.skip_zeros) == (0, False)


def test_subclass_that_steps_projections():
    p = parameter()
    start = p.detach().clone()
    optimizer = GaLoreLike([p])
    step(optimizer, p)
    step(optimizer, p)
    reference = torch.nn.Parameter(start[:, :32].clone())
    other = torch.optim.Adam([reference], lr=1e-2)
    for _ in range(2):
        reference.grad = p.grad[:, :32].clone()
        other.step()
    torch.testing.assert_close(p[:, :32], reference)
    assert_same_bits(p[:, 32:].detach(), start[:, 32:])
    assert optimizer.state[p]["step"] == 2 and optimizer.state[p]["state1"].shape == (64, 32)


def test_subclass_with_an_update_of_its_own_is_asked_for_every_parameter():
    class Counting(optim.AdamW):
        seen = ()

        def update_step(self, group, p, gindex, pindex):
            self.seen += ((gindex, pindex),)
            super().update_step(group, p, gindex, pindex)

    params = [parameter(seed=i) for i in range(3)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    mine, plain = Counting([{"params": params[:1]}, {"params": params[1:]}]), optim.AdamW(others)
    for _ in range(2):
        step(mine, *params)
        step(plain, *others)
    assert mine.seen == ((0, 0), (1, 0), (1, 1)) * 2
    for a, b in zip(params, others):
        assert_same_bits(a.detach(), b.detach())


# ------------------------------------------------------------------------------------------------------------------ one call for many
@grid(name=["AdamW", "AdamW8bit", "AdEMAMix8bit", "LAMB", "Lion8bit", "RMSprop"])
def test_parameters_stepped_together_are_stepped_alike(name):
    sizes = (64, 4096, 6400, 256 * 64, 64)
    together, apart = ([parameter(n, seed=i) for i, n in enumerate(sizes)] for _ in range(2))
    one, many = make(name, together), [make(name, [p]) for p in apart]
    for _ in range(3):
        step(one, *together)
        for i, (p, optimizer) in enumerate(zip(apart, many)):
            step(optimizer, p, seed=5 + i)
    for a, b in zip(together, apart):
        assert_same_bits(a.detach(), b.detach())


def test_many_small_tensors_take_one_call(monkeypatch):
    params = [parameter(128, seed=i) for i in range(20)]
    optimizer = optim.AdamW(params)
    step(optimizer, *params)
    calls = []
    real = bnb.functional.optimizer_step
    monkeypatch.setattr(bnb.functional, "optimizer_step", lambda *args, **kwargs: calls.append(len(args[0])) or real(*args, **kwargs))
    step(optimizer, *params)
    assert calls == [20]


def test_native_kernel_is_called_directly_and_after_the_check(monkeypatch):
    params = [parameter(128, seed=i) for i in range(2)]
    torch.set_default_device(None)  # one that is set sees every call: it goes by way of the dispatcher
    optimizer = optim.AdamW(params)
    step(optimizer, *params)
    calls = []
    check = bnb._ops._CHECKS["optimizer_step"]
    monkeypatch.setitem(bnb._ops._NATIVE, ("optimizer_step", DEVICE), (check, lambda *args, **kwargs: calls.append(len(args[0]))))
    step(optimizer, *params)
    assert calls == [2]
    optimizer.state[params[0]]["state1"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="moments of parameter 0 must have 128 elements, got 3"):
        step(optimizer, *params)


def test_parameters_without_a_gradient_are_left_out():
    p, q = parameter(), parameter(seed=2)
    optimizer = optim.AdamW8bit([p, q])
    step(optimizer, p)
    before = q.detach().clone()
    step(optimizer, p)
    assert_same_bits(q.detach(), before)
    assert q not in optimizer.state or not optimizer.state[q]
    step(optimizer, p, q)
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (3, 1)


def test_closure_is_called_with_gradients():
    p = parameter()

    def closure():
        p.grad = None
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer = optim.SGD([p], 0.1)
    losses = [optimizer.step(closure).item() for _ in range(2)]
    assert losses[1] < losses[0]


def test_plain_tensors_are_parameters_too():
    p = bell(8192).view(64, 128)
    optimizer = optim.Adam8bit([p])
    step(optimizer, p)
    assert optimizer.state[p]["step"] == 1


# --------------------------------------------------------------------------------------------------------------- settings by parameter
def test_groups_set_bits_and_minimal_size_for_themselves():
    params = [parameter(seed=i) for i in range(4)]
    groups = [{"params": [p], **more} for p, more in zip(params, ({}, dict(optim_bits=32), dict(min_8bit_size=10**6), dict(lr=0.5)))]
    optimizer = optim.AdamW8bit(groups, lr=1e-3)
    before = params[3].detach().clone()
    step(optimizer, *params)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.uint8, torch.float32, torch.float32, torch.uint8]
    assert (params[3] - before).abs().mean() > 0.3


def test_groups_set_options_for_themselves():
    up, down = parameter(), parameter()
    optimizer = optim.AdamW([{"params": [up], "maximize": True}, {"params": [down]}], weight_decay=0.0)
    start = up.detach().clone()
    up.grad = down.grad = torch.ones_like(up)
    optimizer.step()
    assert (up > start).all() and (down < start).all()


def test_override_before_and_after_registration(manager):
    params = [parameter(seed=i) for i in range(3)]
    manager.override_config(params[0], "optim_bits", 32)
    manager.register_parameters(params)
    manager.override_config(params[1], key_value_dict={"optim_bits": 32, "lr": 0.0})
    optimizer = optim.Adam8bit(params)
    start = params[1].detach().clone()
    step(optimizer, *params)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.float32, torch.uint8]
    assert_same_bits(params[1].detach(), start)


def test_registered_place_holds_for_the_parameter_after_its_move(manager):
    """On an accelerator the moved parameter is another tensor; a copy stands for it."""
    params = [parameter(seed=i) for i in range(2)]
    manager.override_config(params[1], "optim_bits", 32)
    manager.register_parameters(params)
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    gc.collect()
    optimizer = optim.Adam8bit(params)
    step(optimizer, *params)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.uint8, torch.float32]


def test_registered_place_does_not_leak_to_other_optimizers(manager):
    params = [parameter(seed=i) for i in range(2)]
    manager.override_config(params[1], "optim_bits", 32)
    manager.register_parameters(params)
    others = [parameter(seed=i) for i in range(2)]
    optimizer = optim.Adam8bit(others)
    step(optimizer, *others)
    assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in others)


def test_module_override_does_not_leak_to_other_optimizers(manager):
    embedding = torch.nn.Embedding(100, 64)
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    first = optim.Adam8bit(embedding.parameters())
    step(first, embedding.weight)
    assert first.state[embedding.weight]["state1"].dtype == torch.float32
    unrelated = parameter(6400)
    second = optim.Adam8bit([unrelated])
    step(second, unrelated)
    assert second.state[unrelated]["state1"].dtype == torch.uint8


def test_override_dies_with_its_parameter(manager):
    for _ in range(50):
        manager.override_config(parameter(), "optim_bits", 32)
    gc.collect()
    assert manager.pid2config == {}
    params = [parameter(seed=i) for i in range(50)]
    optimizer = optim.Adam8bit(params)
    step(optimizer, *params)
    assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in params)


def test_override_of_a_list_is_one_for_each(manager):
    p, q = parameter(), parameter(seed=2)
    manager.override_config([p, q], "optim_bits", 32)
    manager.override_config(p, "optim_bits", 8)
    assert (manager.pid2config[id(p)]["optim_bits"], manager.pid2config[id(q)]["optim_bits"]) == (8, 32)


def test_modules_that_lost_their_parameter_disturb_nobody(manager):
    module = torch.nn.Embedding(4, 4)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = None
    p = parameter()
    step(optim.Adam8bit([p]), p)
    del module
    gc.collect()
    assert manager.module_weight_config_triple == []


def test_overrides_change_hyperparameters_while_training(manager):
    p = parameter()
    optimizer = optim.AdamW8bit([p])
    step(optimizer, p)
    manager.override_config(p, key_value_dict={"lr": 0.0})
    before = p.detach().clone()
    step(optimizer, p)
    assert_same_bits(p.detach(), before)


def test_manager_is_shared_and_says_what_it_needs(manager):
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()
    with pytest.raises(IndexError):
        manager.register_parameters([])
    with pytest.raises(ValueError, match="either"):
        manager.override_config(parameter())


# --------------------------------------------------------------------------------------------------------------------------- paging
@grid(name=[name for name in CLASSES if name.startswith("Paged")])
def test_paged_classes_step_like_the_others_and_say_once_that_the_cpu_has_ordinary_memory(name):
    params = [torch.nn.Parameter(torch.randn(100_000)) for _ in range(2)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = make(name, params), make(name.removeprefix("Paged"), twins)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for p, q in zip(params, twins):
                p.grad = q.grad = torch.randn(100_000)
            optimizer.step()
            other.step()
    said = [str(w.message) for w in caught if "aged" in str(w.message)]
    assert said == (["Paged optimizers use ordinary memory for parameters on the CPU."] if DEVICE == "cpu" else [])
    for p, q in zip(params, twins):
        assert_same_bits(p.detach(), q.detach())
