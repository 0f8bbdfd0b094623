"""What optimizers go through: saving, loading, copying, other people's checkpoints, unusual memory layouts and gradients."""

from copy import deepcopy
import io
from pathlib import Path
import pickle

from golden import record_optim
from helpers import DEVICE, assert_same_bits, bell, grid
from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes import optim

GOLDEN = Path(record_optim.__file__).parent
NESTED = "__bnb_optimizer_quant_state__"

MAKERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2),
    "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-2),
    "Adam amsgrad": lambda p: optim.Adam(p, amsgrad=True, optim_bits=8),
    "AdEMAMix8bit": lambda p: optim.AdEMAMix8bit(p, t_alpha=10),
    "LAMB8bit": lambda p: optim.LAMB8bit(p),
    "LARS": lambda p: optim.LARS(p, 0.1, momentum=0.9),
    "Lion8bit": lambda p: optim.Lion8bit(p),
    "PagedAdamW8bit": lambda p: optim.PagedAdamW8bit(p),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad8bit": lambda p: optim.Adagrad8bit(p, initial_accumulator_value=0.1, lr_decay=0.1),
    "SGD nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "AdamW rounding": lambda p: optim.AdamW8bit(p, stochastic_rounding=True, seed=3),
}


def build(dtype=torch.float32):
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 8)).to(dtype)
    for i, p in enumerate(model.parameters()):
        p.data.copy_(bell(p.numel(), seed=i).view(p.shape))
    return model


def train(model, optimizer, steps):
    for step in steps:
        for i, p in enumerate(model.parameters()):
            p.grad = (bell(p.numel(), seed=100 * step + i) * 0.1).view(p.shape).to(p.dtype)
        optimizer.step()


def through_a_file(state, **kwargs):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **kwargs)


def assert_same_parameters(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert_same_bits(p.detach(), q.detach())


# ------------------------------------------------------------------------------------------------------------------ save and load
@grid(maker=MAKERS, dtype=[torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_file_as_if_nothing_had_been(maker, dtype):
    model, other = build(dtype), build(dtype)
    optimizer, new = (MAKERS[maker](m.parameters()) for m in (model, other))
    train(model, optimizer, range(3))
    new.load_state_dict(through_a_file(optimizer.state_dict(), weights_only=True))
    other.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), other.parameters()):
        assert optimizer.state[p].keys() == new.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, new.state[q][key]) if isinstance(value, torch.Tensor) else value == new.state[q][key]
    train(model, optimizer, range(3, 6))
    train(other, new, range(3, 6))
    assert_same_parameters(model, other)


@grid(maker=["AdamW", "AdamW8bit"])
def test_file_has_the_published_form(maker):
    model = build()
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert saved["param_groups"][0] == dict(
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, alpha=0.0, t_alpha=None, t_beta3=None, params=[0, 1, 2, 3]
    )
    extra = {"qmap1", "qmap2", "absmax1", "absmax2"} if "8bit" in maker else set()
    assert saved["state"][0].keys() == {"step", NESTED} and saved["state"][0][NESTED].keys() == {"state1", "state2"} | extra
    weight = next(model.parameters())
    assert saved["state"][0][NESTED]["state1"] is optimizer.state[weight]["state1"] and "state1" in optimizer.state[weight]


@grid(maker=["AdamW8bit", "AdEMAMix8bit"])
def test_flat_checkpoints_of_older_versions_are_read(maker):
    model, other = build(), build()
    optimizer, new = (MAKERS[maker](m.parameters()) for m in (model, other))
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"] = {i: {"step": s["step"], **s[NESTED]} for i, s in saved["state"].items()}
    new.load_state_dict(saved)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, new, range(2, 4))
    assert_same_parameters(model, other)


@grid(name=record_optim.OPTIMIZERS)
def test_checkpoints_of_the_published_library_are_continued(name):
    """Recorded by golden/record_optim.py. 8-bit codes of the published CPU path are not always the nearest, which shows in the last digits."""
    recorded = torch.load(GOLDEN / "optim.pt", weights_only=True, map_location=DEVICE)[name]
    params, optimizer = record_optim.start(name)
    for p, then in zip(params, recorded["then"]):
        p.data.copy_(then)
    optimizer.load_state_dict(recorded["state"])
    saved, ours = recorded["state"]["state"], optimizer.state_dict()["state"]
    for i, state in saved.items():
        assert state.keys() == ours[i].keys() and state[NESTED].keys() == ours[i][NESTED].keys()
        for key, value in state[NESTED].items():
            assert_same_bits(ours[i][NESTED][key], value)
    ended = record_optim.train(params, optimizer, range(3, 5))
    for p, end in zip(ended, recorded["end"]):
        torch.testing.assert_close(p, end, rtol=1e-4, atol=2e-4 if "8bit" in name else 1e-6)


def test_loading_copies():
    model, other = build(), build()
    optimizer, new = optim.AdamW8bit(model.parameters()), optim.AdamW8bit(other.parameters())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    before = deepcopy(saved)
    new.load_state_dict(saved)
    train(other, new, range(1))
    for i, state in before["state"].items():
        for key, value in state[NESTED].items():
            assert_same_bits(saved["state"][i][NESTED][key], value)


def test_saved_hyperparameters_replace_those_of_the_group():
    model = build()
    optimizer = optim.AdamW(model.parameters(), lr=0.5, betas=(0.8, 0.9))
    new = optim.AdamW(model.parameters())
    new.load_state_dict(optimizer.state_dict())
    assert (new.param_groups[0]["lr"], new.param_groups[0]["betas"]) == (0.5, (0.8, 0.9))


def test_groups_of_other_sizes_are_refused():
    model = build()
    saved = optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match=r"\[4\].*\[3\]"):
        optim.AdamW(list(model.parameters())[:3]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"\[4\].*\[2, 2\]"):
        optim.AdamW([{"params": list(model.parameters())[i : i + 2]} for i in (0, 2)]).load_state_dict(saved)


def broken(key, value):
    def change(state):
        if value is None:
            del state[key]
        else:
            state[key] = value

    return change


@grid(
    change=[
        broken("absmax1", None), broken("absmax1", torch.zeros(3)), broken("state1", torch.zeros(7, dtype=torch.uint8)),
        broken("state2", torch.zeros(9)),
    ]
)  # fmt: skip
def test_states_that_do_not_fit_are_refused_and_nothing_is_changed(change):
    model = build()
    optimizer, new = optim.AdamW8bit(model.parameters()), optim.AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    change(saved["state"][0][NESTED])
    with pytest.raises(ValueError, match="state1|state2|absmax"):
        new.load_state_dict(saved)
    assert not new.state and new.param_groups[0]["lr"] == 1e-3


def test_foreign_state_is_kept_and_cast_like_the_parameter():
    """GaLore and others keep their own things beside ours."""
    model = build(torch.bfloat16)
    p = next(model.parameters())
    optimizer = optim.AdamW([p])
    train(torch.nn.ParameterList([p]), optimizer, range(1))
    optimizer.state[p].update(projection=torch.ones(3), notes={"rank": 4, "basis": [torch.ones(2)]}, count=torch.tensor(3))
    new = optim.AdamW([p])
    new.load_state_dict(optimizer.state_dict())
    state = new.state[p]
    assert state["projection"].dtype == torch.bfloat16 and state["notes"]["basis"][0].dtype == torch.bfloat16
    assert state["count"].dtype == torch.int64 and state["notes"]["rank"] == 4 and state["state1"].dtype == torch.float32


def test_hooks_are_called():
    model = build()
    optimizer = optim.AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("load") or {**state, "seen": True})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("step"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("stepped"))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(1))
    assert calls == ["save", "saved", "load", "loaded", "step", "stepped"]


# --------------------------------------------------------------------------------------------------------------- 8 bit and 32 bit
@grid(maker=[(optim.AdamW, optim.AdamW8bit), (optim.AdEMAMix, optim.AdEMAMix8bit), (optim.Lion, optim.Lion8bit)], narrow=[True, False])
def test_states_keep_their_bits_unless_asked(maker, narrow):
    wide, eight = maker
    source, target = (wide, eight) if narrow else (eight, wide)
    model = build()
    optimizer = source(model.parameters())
    train(model, optimizer, range(2))
    weight = next(model.parameters())
    kept, converted = target(model.parameters()), target(model.parameters())
    kept.load_state_dict(optimizer.state_dict())
    converted.load_state_dict(optimizer.state_dict(), convert_states=True)
    assert kept.state[weight]["state1"].dtype == optimizer.state[weight]["state1"].dtype
    assert converted.state[weight]["state1"].dtype == (torch.uint8 if narrow else torch.float32)
    before, after = (state_in_float(o.state[weight]) for o in (optimizer, converted))
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.02 * before.abs().max().item())
    train(model, kept, range(1))
    train(model, converted, range(1))


def state_in_float(state):
    if state["state1"].dtype != torch.uint8:
        return state["state1"]
    rows = state["state1"].view(-1, 80, 64)
    absmax = state["absmax1"].view(len(rows), -1)
    values = [F.dequantize_blockwise(r, absmax=a, code=state["qmap1"], blocksize=256) for r, a in zip(rows, absmax)]
    return torch.stack(values).view_as(state["state1"])


T = torch.optim
TORCH_PAIRS = {
    "AdamW": (lambda p: T.AdamW(p, 0.02, (0.8, 0.9), weight_decay=0.1), optim.AdamW),
    "Adam": (lambda p: T.Adam(p, 0.02, weight_decay=0.1), optim.Adam),
    "Adam amsgrad": (lambda p: T.Adam(p, 0.02, amsgrad=True), optim.Adam),
    "AdamW8bit": (lambda p: T.AdamW(p, 0.02), optim.AdamW8bit),
    "SGD": (lambda p: T.SGD(p, 0.02, 0.9, 0.1, weight_decay=0.1), lambda p: optim.SGD(p, 1.0)),
    "SGD nesterov": (lambda p: T.SGD(p, 0.02, 0.9, nesterov=True), lambda p: optim.SGD(p, 1.0)),
    "SGD plain": (lambda p: T.SGD(p, 0.02), lambda p: optim.SGD(p, 1.0)),
    "RMSprop": (lambda p: T.RMSprop(p, 0.02, alpha=0.7), optim.RMSprop),
    "RMSprop all": (lambda p: T.RMSprop(p, 0.002, momentum=0.5, centered=True), optim.RMSprop),
    "Adagrad": (lambda p: T.Adagrad(p, 0.02, lr_decay=0.1, initial_accumulator_value=0.3), optim.Adagrad),
}


@grid(pair=TORCH_PAIRS)
def test_checkpoint_of_torch_optim_is_continued(pair):
    theirs, ours = TORCH_PAIRS[pair]
    model, other = build(), build()
    reference = theirs(model.parameters())
    train(model, reference, range(4))
    other.load_state_dict(model.state_dict())
    optimizer = ours(other.parameters())
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    train(model, reference, range(4, 8))
    train(other, optimizer, range(4, 8))
    weight = next(other.parameters())
    if pair == "AdamW8bit":
        assert optimizer.state[weight]["state1"].dtype == torch.uint8
    for p, q in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-2 if pair == "AdamW8bit" else 1e-5)


def test_state_of_another_algorithm_is_refused_with_its_name():
    model = build()
    reference = T.Adadelta(model.parameters())
    train(model, reference, range(1))
    optimizer = optim.AdamW(model.parameters())
    optimizer.load_state_dict(reference.state_dict())
    with pytest.raises(RuntimeError, match="acc_delta"):
        train(model, optimizer, range(1))


# ------------------------------------------------------------------------------------------------------------------ copy and pickle
@grid(maker=MAKERS, how=["pickle", "deepcopy"])
def test_copies_are_whole(maker, how):
    model = build()
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, range(2))
    model2, copy = pickle.loads(pickle.dumps((model, optimizer))) if how == "pickle" else deepcopy((model, optimizer))
    assert vars(copy.args) == vars(optimizer.args) and copy.options == optimizer.options and type(copy) is type(optimizer)
    train(model, optimizer, range(2, 4))
    train(model2, copy, range(2, 4))
    assert_same_parameters(model, model2)
    assert copy.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_copy_of_an_optimizer_that_has_not_stepped():
    model = build()
    model2, copy = deepcopy((model, optim.AdamW8bit(model.parameters())))
    train(model2, copy, range(1))
    assert copy.state[next(model2.parameters())]["state1"].dtype == torch.uint8


def test_groups_may_be_added_while_training():
    model = build()
    first, *rest = model.parameters()
    optimizer = optim.AdamW8bit([first])
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": rest, "lr": 0.1})
    train(model, optimizer, range(1, 2))
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [2, 1, 1, 1]


def test_learning_rate_schedulers_work():
    model = build()
    optimizer = optim.AdamW8bit(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


# ------------------------------------------------------------------------------------------------------------------ memory layout
@given(
    maker=st.sampled_from(["AdamW", "AdamW8bit", "AdEMAMix8bit", "LAMB8bit", "SGD nesterov"]),
    layout=st.sampled_from(["channels_last", "view", "transposed"]),
)
def test_memory_layout_and_aliases_of_parameters_stay(maker, layout):
    values = bell(16 * 24 * 5 * 5).view(16, 24, 5, 5)
    if layout == "channels_last":
        base = values.clone(memory_format=torch.channels_last)
        p = base.detach()
    elif layout == "view":
        base = torch.stack((values, values))
        p = base[1]
    else:
        base = values.clone().transpose(0, 3)
        p = base.detach()
    dense = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    strides, address, version = p.stride(), p.data_ptr(), p._version
    p.requires_grad_()
    optimizer, plain = MAKERS[maker]([p]), MAKERS[maker]([dense])
    for step in range(3):
        g = bell(p.numel(), seed=step).view(p.shape)
        p.grad, dense.grad = g.clone(memory_format=torch.channels_last) if layout == "channels_last" else g.clone(), g
        optimizer.step()
        plain.step()
    assert (p.stride(), p.data_ptr()) == (strides, address) and p._version > version
    assert_same_bits(p.detach().contiguous(), dense.detach())
    assert_same_bits((base[1] if layout == "view" else base).detach().contiguous(), dense.detach())


def test_parameters_that_share_memory_stay_views():
    flat = torch.nn.Parameter(bell(10000))
    parts = [flat.detach()[:6000].view(60, 100).requires_grad_(), flat.detach()[6000:].requires_grad_()]
    optimizer = optim.AdamW8bit(parts, lr=0.1)
    before = flat.detach().clone()
    for p in parts:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (flat != before).all()
    assert_same_bits(flat.detach(), torch.cat([p.detach().reshape(-1) for p in parts]))


OVERLAPPING = {
    "rows": lambda t: [t[:6], t[4:]],
    "columns": lambda t: [t[:, :30_000], t[:, 20_000:]],
    "transposed": lambda t: [t.t(), t[2:5]],
}


@grid(cut=OVERLAPPING)
def test_parameters_that_overlap_are_stepped_one_after_the_other(cut):
    together, apart = bell(8 * 50_000).view(8, -1), bell(8 * 50_000).view(8, -1)
    in_one_call, one_by_one = OVERLAPPING[cut](together), OVERLAPPING[cut](apart)
    for i, (p, q) in enumerate(zip(in_one_call, one_by_one)):
        p.grad = bell(p.numel(), seed=i).view(p.shape)
        q.grad = p.grad.clone()
    optim.AdamW(in_one_call, lr=0.1).step()
    for q in one_by_one:
        optim.AdamW([q], lr=0.1).step()
    assert_same_bits(together, apart)


def test_gradient_is_left_alone():
    p = torch.nn.Parameter(bell(8192).view(64, 128))
    g = bell(8192, seed=2).view(128, 64).t()
    p.grad = g
    before = g.clone()
    optim.AdamW8bit([p], weight_decay=0.1).step()
    assert p.grad is g and g.stride() == (1, 64) and torch.equal(g, before)


@grid(cls=[optim.Adam, optim.AdamW8bit, optim.Lion])
def test_sparse_gradients_are_refused(cls):
    embedding = torch.nn.Embedding(100, 64, sparse=True, device="cpu")
    embedding(torch.tensor([1, 2], device="cpu")).sum().backward()
    with pytest.raises(RuntimeError, match="dense.*sparse"):
        cls(embedding.parameters()).step()


def test_unsupported_parameter_types_are_named():
    p = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="float64"):
        optim.AdamW([p]).step()


@grid(maker=["AdamW", "AdamW8bit", "AdEMAMix8bit"])
def test_parameters_of_unusual_size(maker):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((), (0, 3), (1,))]
    optimizer = MAKERS[maker](params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.shape for p in params] == [(), (0, 3), (1,)] and params[0] != 0


# ------------------------------------------------------------------------------------------- what changes between two steps
def moved(tensor):
    tensor.data = tensor.data.clone()


def replaced(state):
    for key, value in state.items():
        state[key] = value.clone() if isinstance(value, torch.Tensor) else value


def by_another_dict(optimizer, p):
    optimizer.state[p] = dict(optimizer.state[p])
    replaced(optimizer.state[p])


# Each leaves every value as it is, and some of it in other memory.
MOVES = {
    "parameter": lambda optimizer, p: moved(p),
    "parameter in another layout": lambda optimizer, p: setattr(p, "data", p.data.t().contiguous().t()),
    "moments": lambda optimizer, p: [moved(optimizer.state[p][key]) for key in ("state1", "state2")],
    "statistics": lambda optimizer, p: [moved(optimizer.state[p][key]) for key in ("absmax1", "absmax2")],
    "entries of the state": lambda optimizer, p: replaced(optimizer.state[p]),
    "state": by_another_dict,
    "storage": lambda optimizer, p: [optimizer.state[p][key].share_memory_() for key in ("state1", "absmax2")],
    "all by loading": lambda optimizer, p: optimizer.load_state_dict(deepcopy(optimizer.state_dict())),
    "all by pickling": lambda optimizer, p: optimizer.__setstate__(deepcopy(optimizer.__getstate__(), {id(q): q for q in optimizer.state})),
}  # fmt: skip


@grid(move=MOVES)
def test_a_step_finds_what_has_moved_since_the_last(move):
    model, other = build(), build()
    optimizer, plain = optim.AdamW8bit(model.parameters(), lr=1e-2), optim.AdamW8bit(other.parameters(), lr=1e-2)
    train(model, optimizer, range(2))
    train(other, plain, range(2))
    MOVES[move](optimizer, next(model.parameters()))
    train(model, optimizer, range(2, 4))
    train(other, plain, range(2, 4))
    assert_same_parameters(model, other)
    for p, q in zip(model.parameters(), other.parameters()):
        assert_same_bits(optimizer.state[p]["state1"], plain.state[q]["state1"])


# Each keeps the first address of a tensor.
MISFITS = {
    "fewer codes": lambda state: setattr(state["state1"], "data", state["state1"].data[:10]),
    "codes of another type": lambda state: setattr(state["state1"], "data", state["state1"].data.view(torch.int8)),
    "less statistics": lambda state: setattr(state["absmax2"], "data", state["absmax2"].data[:3]),
    "statistics of another type": lambda state: setattr(state["absmax2"], "data", state["absmax2"].data.view(torch.int32)),
    "cut in place": lambda state: state["state2"].resize_(7),
}


@grid(misfit=MISFITS)
def test_a_step_refuses_states_that_no_longer_fit(misfit):
    model = build()
    optimizer = optim.AdamW8bit(model.parameters())
    train(model, optimizer, range(2))
    p = next(model.parameters())
    MISFITS[misfit](optimizer.state[p])
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"moments|absmax"):
        train(model, optimizer, range(2, 3))
    assert_same_bits(p.detach(), before)
    assert optimizer.state[p]["step"] == 2


def test_a_step_takes_the_gradients_that_there_are():
    """Frozen parameters, gradients that are missing, in other memory, and then sparse."""
    model, other = build(), build()
    optimizer, plain = optim.AdamW8bit(model.parameters()), [optim.AdamW8bit([q]) for q in other.parameters()]
    train(model, optimizer, range(2))
    for one in plain:
        train(other, one, range(2))
    for step, missing in enumerate((0, 2, 1), 2):
        for i, (p, q) in enumerate(zip(model.parameters(), other.parameters())):
            p.requires_grad_(i != missing)
            p.grad = None if i == missing else bell(p.numel(), seed=step).view(p.shape)
            q.grad = None if i == missing else p.grad.clone()
        optimizer.step()
        for one in plain:
            one.step()
    assert_same_parameters(model, other)
    p = next(model.parameters())
    p.requires_grad_().grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()


def test_parameters_may_become_narrower_between_steps():
    model = build()
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    for p in model.parameters():
        p.data, p.grad = p.data.bfloat16(), None
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2, 3))
    assert all(p.dtype == torch.bfloat16 and not torch.equal(p, old) for p, old in zip(model.parameters(), before))
