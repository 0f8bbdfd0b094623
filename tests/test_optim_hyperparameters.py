"""Hyperparameters of the wrong kind: in constructors, in groups, in checkpoints; and those that launchers hand over as strings."""

from ast import literal_eval
from copy import deepcopy

from helpers import assert_same_bits, bell, grid
import pytest
import torch

from bitsandbytes import optim


def parameter():
    return torch.nn.Parameter(bell(8192).view(64, 128))


def step(optimizer, p):
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()


SPELLED = {
    "AdamW8bit": dict(lr="1e-3", eps="1e-6", weight_decay="0.1", min_8bit_size="128", maximize="True"),
    "AdEMAMix": dict(alpha="3", t_alpha="20", t_beta3="30"),
    "Lion8bit": dict(lr="0.01", skip_zeros="False"),
    "RMSprop": dict(alpha="0.9", momentum="0.5", centered="True", optim_bits="32"),
    "SGD": dict(lr="0.1", momentum="0.9", nesterov="True"),
    "Adagrad": dict(lr_decay="0.1", initial_accumulator_value="0.5"),
    "LAMB": dict(bias_correction="False", max_unorm="0.5"),
    "LARS": dict(lr="0.1", momentum="0.9", max_unorm="0.1"),
}


@grid(name=SPELLED)
def test_numbers_and_switches_may_be_spelled_out(name):
    spelled, plain = parameter(), parameter()
    texts = SPELLED[name]
    ours = getattr(optim, name)([spelled], **texts)
    same = getattr(optim, name)([plain], **{key: literal_eval(text) for key, text in texts.items()})
    for p, optimizer in ((spelled, ours), (plain, same)):
        step(optimizer, p)
    assert_same_bits(spelled.detach(), plain.detach())
    assert ours.param_groups[0].keys() == same.param_groups[0].keys()
    assert not any(isinstance(value, str) for value in (*ours.param_groups[0].values(), *vars(ours.args).values(), *ours.options.values()))


@grid(
    name_and_kwargs=[
        ("RMSprop", dict(alpha="nine tenths")), ("RMSprop", dict(centered="1")), ("AdamW", dict(lr="True")), ("SGD", dict(lr="")),
        ("AdEMAMix8bit", dict(t_alpha="(1, 2)")), ("Adam", dict(lr=None)), ("Adam", dict(betas=0.9)), ("Lion", dict(betas=("0.9", "0.99"))),
        ("PytorchLARS", dict(lr="0.1")), ("PytorchLARS", dict(momentum=[0.9])),
    ]
)  # fmt: skip
def test_what_is_no_number_is_refused_with_its_name(name_and_kwargs):
    name, kwargs = name_and_kwargs
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        getattr(optim, name)([parameter()], **kwargs)


@grid(change=[dict(lr="0.1"), dict(betas=0.9), dict(betas={"beta1": 0.9}), dict(weight_decay=[0.1]), dict(t_alpha="3")])
def test_groups_are_looked_at_as_well(change):
    with pytest.raises(TypeError, match=next(iter(change))):
        optim.AdEMAMix([{"params": [parameter()], **change}])
    optimizer = optim.AdEMAMix([parameter()])
    with pytest.raises(TypeError, match=next(iter(change))):
        optimizer.add_param_group({"params": [parameter()], **change})
    assert len(optimizer.param_groups) == 1


# ---------------------------------------------------------------------------------------------------------------------- checkpoints
WRONG_GROUPS = {
    "betas": [0.9, "(0.9, 0.99)", {"0": 0.9, "1": 0.99}, [0.9, "0.99"], (0.9,), (0.9, 0.99, 0.999)],
    "lr": ["0.1", None, [0.1], torch.ones(2)],
    "eps": ["1e-8", {}],
    "weight_decay": [None, "0"],
}


@grid(key_and_value=[(key, value) for key, values in WRONG_GROUPS.items() for value in values])
def test_a_checkpoint_with_wrong_hyperparameters_changes_nothing(key_and_value):
    key, value = key_and_value
    p = parameter()
    optimizer = optim.AdamW8bit([p])
    step(optimizer, p)
    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {"lr": 7.0, key: value}
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@grid(count=[-1, "3", 2.5, None, [1], torch.tensor([1, 2])])
def test_a_checkpoint_counts_steps_in_whole_numbers(count):
    p = parameter()
    optimizer = optim.AdamW8bit([p])
    step(optimizer, p)
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = count
    with pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 1


def test_a_learning_rate_may_be_a_tensor():
    p, q = parameter(), parameter()
    optimizer, plain = optim.AdamW([p], lr=torch.tensor(0.25)), optim.AdamW([q], lr=0.25)
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    step(optimizer, p)
    step(plain, q)
    assert_same_bits(p.detach(), q.detach())
