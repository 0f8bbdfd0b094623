"""What the published library 0.50.2 wrote and computed in 8 bit, against this one. `golden/record.py` made the files."""

import os
from pathlib import Path

from golden import cases
from helpers import DEVICE, assert_same_bits, run_python
import pytest
from safetensors.torch import load_file
import torch

import bitsandbytes as bnb

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED_PYTHON = os.environ.get("BNB_PUBLISHED_PYTHON")

every_layer = pytest.mark.parametrize("name", cases.int8_layers())


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "int8.safetensors", device=DEVICE)


def assert_computes_the_same(layer, name, recorded):
    """The published operators on this layer's weight give the recorded result; the layer, with 16 scales a row of activations, a more exact one."""
    case, result = cases.int8_layers()[name], recorded[f"{name}.result"]
    x = case.x()
    codes, scales, columns = bnb.functional.int8_vectorwise_quant(x, threshold=case.threshold)
    ops = torch.ops.bitsandbytes
    composed, _ = ops.int8_mixed_scaled_mm(x, codes, layer.weight.data, scales, layer.weight.SCB, columns, layer.bias.detach())
    torch.testing.assert_close(composed, result, rtol=2e-3, atol=2e-3)
    exact = x.double() @ layer.weight.dequantize().double().t() + layer.bias.detach().double()
    for training in (True, False):
        with torch.no_grad():
            ours = layer.train(training)(x)
        assert ours.dtype == result.dtype and (ours.double() - exact).norm() < 0.75 * (result.double() - exact).norm()


@pytest.mark.parametrize("name", cases.int8_rows())
def test_rows(name, recorded):
    case = cases.int8_rows()[name]
    codes, scales, columns = bnb.functional.int8_vectorwise_quant(case.input(), threshold=case.threshold)
    assert_same_bits(codes, recorded[f"{name}.codes"])
    assert_same_bits(scales, recorded[f"{name}.scales"])
    assert (columns is None) == (case.threshold == 0)
    if columns is not None:
        assert torch.equal(columns, recorded[f"{name}.columns"]) and columns.numel()


@every_layer
@pytest.mark.parametrize("when", ["new", "used"])
def test_checkpoints_load_and_are_written_back(name, when, recorded):
    saved = torch.load(GOLDEN / f"int8_{name}_{when}.pt", weights_only=True, map_location=DEVICE)
    case = cases.int8_layers()[name]
    for layer in (case.empty(bnb).to(DEVICE), case.quantised(bnb)):
        layer.load_state_dict(saved)
        assert_computes_the_same(layer, name, recorded)
        written = layer.state_dict()
        assert list(written) == list(saved)
        for key, tensor in written.items():
            assert_same_bits(tensor, saved[key])


@every_layer
def test_a_newly_quantised_layer_is_the_published_one(name, recorded):
    layer, saved = cases.int8_layers()[name].quantised(bnb), torch.load(GOLDEN / f"int8_{name}_new.pt", weights_only=True, map_location=DEVICE)
    for key, tensor in layer.state_dict().items():
        assert_same_bits(tensor, saved[key])
    assert_computes_the_same(layer, name, recorded)


@every_layer
def test_pickled_modules_load(name, recorded):
    layer = torch.load(GOLDEN / f"int8_{name}_module.pt", weights_only=False, map_location=DEVICE)
    assert type(layer.weight) is bnb.nn.Int8Params and layer.state.threshold == cases.int8_layers()[name].threshold
    assert_computes_the_same(layer, name, recorded)


LOAD_WITH_PUBLISHED = """
import sys
import torch
import bitsandbytes as bnb
assert bnb.__version__ == "0.50.2", bnb.__file__
saved = torch.load(sys.argv[1])
layer = bnb.nn.Linear8bitLt(saved["weight"].shape[1], saved["weight"].shape[0], has_fp16_weights=False, threshold=float(sys.argv[2])).half().to("cpu")
layer.load_state_dict(saved)
with torch.no_grad():
    torch.save(layer.eval()(torch.load(sys.argv[3])), sys.argv[4])
"""


@every_layer
@pytest.mark.skipif(not PUBLISHED_PYTHON, reason="BNB_PUBLISHED_PYTHON does not name an interpreter with bitsandbytes 0.50.2")
def test_the_published_library_reads_our_checkpoints(name, recorded, tmp_path):
    case = cases.int8_layers()[name]
    torch.save(case.quantised(bnb).state_dict(), tmp_path / "saved.pt")
    torch.save(case.x(), tmp_path / "x.pt")
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    arguments = [str(tmp_path / "saved.pt"), str(case.threshold), str(tmp_path / "x.pt"), str(tmp_path / "out.pt")]
    done = run_python(LOAD_WITH_PUBLISHED, *arguments, interpreter=PUBLISHED_PYTHON, env=clean, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_bits(torch.load(tmp_path / "out.pt", map_location=DEVICE), recorded[f"{name}.result"])
