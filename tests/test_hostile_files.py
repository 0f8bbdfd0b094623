"""Files from `hostile/`, each a good checkpoint with one thing wrong: refused by name of the key, and nothing has changed."""

import copy
from pathlib import Path

from helpers import DEVICE
import pytest
from safetensors.torch import load_file
import torch

import bitsandbytes as bnb

FOLDER = Path(__file__).resolve().parent / "hostile"
OUT_FEATURES, IN_FEATURES = 8, 64
LAYERS = {
    "linear4bit": lambda: bnb.nn.Linear4bit(IN_FEATURES, OUT_FEATURES, bias=False, quant_type="nf4"),
    "linear8bit": lambda: bnb.nn.Linear8bitLt(IN_FEATURES, OUT_FEATURES, bias=False, has_fp16_weights=False),
}
FILES = sorted(FOLDER.glob("*.safetensors"))
OPTIMIZER_FILES = sorted(FOLDER.glob("*.pt"))


def layer_of(path: Path, where: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, _ = path.name.split("--")
    if where == "meta":
        with torch.device("meta"):
            return LAYERS[kind]()
    return LAYERS[kind]().to(DEVICE) if where == "quantised" else LAYERS[kind]()


def contents(layer: torch.nn.Module) -> dict:
    return {key: (value.dtype, value.shape, None if value.is_meta else value.clone()) for key, value in layer.state_dict().items()}


def assert_same_contents(before: dict, after: dict) -> None:
    assert list(before) == list(after)
    for key, (dtype, shape, values) in before.items():
        assert (dtype, shape) == after[key][:2], key
        assert values is None or torch.equal(values, after[key][2]), key


def test_the_files_are_there():
    assert len(FILES) >= 50 and len(OPTIMIZER_FILES) >= 10


@pytest.mark.parametrize("where", ["quantised", "dense", "meta"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_hostile_checkpoint_is_refused_and_leaves_the_layer_as_it_was(path, where, assign):
    layer, saved = layer_of(path, where), load_file(path)
    before, before_saved, kind = contents(layer), dict(saved), type(layer.weight)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        layer.load_state_dict(saved, assign=assign)
    assert not isinstance(caught.value, (NotImplementedError, RecursionError))
    assert any(word in str(caught.value) for word in ("weight", "SCB", "layout", "format")), caught.value
    assert_same_contents(before, contents(layer))
    assert type(layer.weight) is kind
    assert list(saved) == list(before_saved) and all(saved[key] is before_saved[key] for key in saved)


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("linear4bit")], ids=lambda path: path.stem)
def test_a_hostile_state_is_refused_by_whoever_reads_it(path):
    """What is wrong with the statistics themselves, ``QuantState.from_dict`` sees; the rest, whoever has the weight too."""
    saved = load_file(path)
    statistics = {key: value for key, value in saved.items() if key.startswith("weight.")}
    try:
        state = bnb.functional.QuantState.from_dict(statistics, DEVICE)
    except (ValueError, AssertionError) as error:
        assert len(str(error)) > 15
        return
    assert path.stem.split("--")[1].startswith(("weight-", "blocksize-", "nested-blocksize-", "shape-", "absmax-two"))
    try:
        result = bnb.functional.dequantize_4bit(saved["weight"], state)
    except (ValueError, RuntimeError, TypeError) as error:
        assert len(str(error)) > 15
    else:
        assert result.shape == state.shape


@pytest.mark.parametrize("path", OPTIMIZER_FILES, ids=lambda path: path.stem)
def test_a_hostile_optimizer_state_is_refused_and_leaves_the_optimizer_as_it_was(path):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    optimizer = bnb.optim.Adam8bit([parameter], lr=1e-3)
    parameter.grad = torch.linspace(1, 2, 4096)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("make", [bnb.optim.Adam8bit, bnb.optim.PagedAdamW], ids=lambda make: make.__name__)
@pytest.mark.parametrize("entry", [None, 3, [1, 2]], ids=str)
def test_an_optimizer_state_may_hold_entries_that_belong_to_no_parameter(entry, make):
    """torch.optim keeps them. They stand in the way of nothing."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    optimizer = make([parameter], lr=1e-3)
    parameter.grad = torch.linspace(1, 2, 4096)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(good | {"state": good["state"] | {"mine": entry}})
    assert optimizer.state_dict()["state"]["mine"] == entry
    assert copy.deepcopy(optimizer).state["mine"] == entry
    optimizer.step()
    optimizer.load_state_dict(good)
    assert "mine" not in optimizer.state


# ------------------------------------------------------------------------------------------------------ what no file holds, but a dict may
WITHOUT_DATA = [("meta", lambda tensor: tensor.to("meta")), ("sparse", lambda tensor: tensor.cpu().to_sparse())]


@pytest.mark.parametrize("damage", [damage for _, damage in WITHOUT_DATA], ids=[name for name, _ in WITHOUT_DATA])
@pytest.mark.parametrize(
    "kind, key",
    [("linear4bit", "weight"), ("linear4bit", "weight.absmax"), ("linear4bit", "weight.quant_map"), ("linear8bit", "weight"), ("linear8bit", "SCB")],
)
def test_tensors_without_data_are_refused(kind, key, damage):
    layer = LAYERS[kind]().to(DEVICE)
    before, saved = contents(layer), dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="dense tensor with data") as caught:
        layer.load_state_dict(saved | {key: damage(saved[key])})
    assert "weight" in str(caught.value) or "SCB" in str(caught.value)
    assert_same_contents(before, contents(layer))


def test_a_weight_on_the_meta_device_may_be_assigned():
    layer = LAYERS["linear4bit"]().to(DEVICE)
    layer.load_state_dict({key: value.to("meta") if key == "weight" else value for key, value in layer.state_dict().items()}, assign=True)
    assert layer.weight.is_meta
