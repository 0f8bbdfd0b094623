"""What the published library 0.50.2 wrote and computed, against this one: bit for bit, except where a decision here says otherwise.

`golden/record.py` made the files, `golden/cases.py` holds the inputs. The digests are of the published library's reference platform.
"""

import json
import os
from pathlib import Path
import shutil

from golden import cases
from helpers import (
    DEVICE,
    assert_same_bits,
    bell,
    model_quantize_4bit,
    model_quantize_blockwise,
    raw_bytes,
    run_python,
    sawtooth,
    sha,
    short_name,
    unpack,
)
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED_PYTHON = os.environ.get("BNB_PUBLISHED_PYTHON")


@pytest.fixture(scope="module")
def four_bit():
    return load_file(GOLDEN / "four_bit.safetensors", device=DEVICE)


@pytest.fixture(scope="module")
def eight_bit():
    return load_file(GOLDEN / "eight_bit.safetensors", device=DEVICE)


def about(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])


def with_one_zero(packed: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Published FP4 bytes with the second zero, code 8, replaced by code 0, which is all that is ever written here."""
    if quant_type != "fp4":
        return packed
    data = packed.contiguous().view(-1).view(torch.uint8)
    high, low = data >> 4, data & 15
    return (torch.where(high == 8, 0, high) << 4 | torch.where(low == 8, 0, low)).view(packed.dtype).view(packed.shape)


# -------------------------------------------------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize("name", cases.CODE_MAPS)
def test_code_map(name):
    function, args = cases.CODE_MAPS[name]
    assert_same_bits(getattr(F, function)(*args), load_file(GOLDEN / "codes.safetensors", device=DEVICE)[name])


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_4bit_table(name):
    assert_same_bits(F.get_4bit_type(name, device=DEVICE), load_file(GOLDEN / "codes.safetensors", device=DEVICE)[name])


@pytest.mark.parametrize(
    "make, digest",
    [
        (lambda: F.create_dynamic_map(), "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (lambda: F.create_dynamic_map(signed=False), "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
        (lambda: F.create_linear_map(), "80bf4c55fa736fa18f611d26a59e99475bae78388280fbccbf4c7d12437a4775"),
        (lambda: F.create_linear_map(signed=False), "7cb9ea560989533d101f5082aa194366c6fd5d82a305f2994cc39312a65f7962"),
        (lambda: F.create_fp8_map(), "0da7c4e2990b302a360d0664262e0bce8012809e65954885e9b573c00fd57b04"),
        (lambda: F.create_fp8_map(True, 4, 3, 8), "f3c007a4cafc83fe599bffde8d83c3b00a6c648306af949f2d0a051da02832aa"),
        (lambda: F.create_normal_map(), "695151d62a023d258f8c1b6d9eb7c67501d612a09af2473b5a046db7cf3436be"),
        (lambda: F.get_4bit_type("nf4", device=DEVICE), "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"),
        (lambda: F.get_4bit_type("fp4", device=DEVICE), "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c"),
    ],
    ids=["dynamic", "dynamic_unsigned", "linear", "linear_unsigned", "fp8_e5m2", "fp8_e4m3", "normal", "nf4", "fp4"],
)
def test_digest_of_table(make, digest):
    assert sha(make(), digits=64) == digest


# --------------------------------------------------------------------------------------------------------------------------------- 4 bit
@pytest.mark.parametrize("name", cases.four_bit())
def test_quantize_4bit(four_bit, name):
    case = cases.four_bit()[name]
    packed, state = F.quantize_4bit(case.input(), blocksize=case.blocksize, quant_type=case.quant_type, quant_storage=case.storage)
    assert_same_bits(packed, with_one_zero(four_bit[f"{name}.packed"], case.quant_type))
    assert_same_bits(state.absmax, four_bit[f"{name}.absmax"])


@pytest.mark.parametrize("name", cases.four_bit_dequantize())
def test_dequantize_4bit(four_bit, name):
    case = cases.four_bit_dequantize()[name]
    values = torch.ops.bitsandbytes.dequantize_4bit(case.packed(), case.absmax(), case.blocksize, case.quant_type, [case.n], case.dtype)
    assert_same_bits(values, four_bit[f"{name}.values"])


@pytest.mark.parametrize("name", cases.nested())
def test_nested_statistics(four_bit, name):
    case = cases.nested()[name]
    packed, state = F.quantize_4bit(case.input(), blocksize=case.blocksize, quant_type=case.quant_type, compress_statistics=True)
    assert_same_bits(packed, with_one_zero(four_bit[f"{name}.packed"], case.quant_type))
    assert_same_bits(state.absmax, four_bit[f"{name}.absmax"])
    assert_same_bits(state.offset, four_bit[f"{name}.offset"])
    assert_same_bits(state.state2.absmax, four_bit[f"{name}.absmax2"])
    assert_same_bits(F.dequantize_4bit(packed, state), four_bit[f"{name}.values"])


S = sawtooth(128, 101, 37)
BIG = sawtooth(65536, 65521, 12289, divisor=64 * 512)


def test_packed_bytes_in_full():
    packed, state = F.quantize_4bit(S, blocksize=64, quant_type="nf4")
    assert state.absmax.tolist() == [0.78125, 0.78125]
    assert raw_bytes(packed).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
    )
    packed, _ = F.quantize_4bit(S, blocksize=64, quant_type="fp4")
    assert raw_bytes(packed).hex() == (
        "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5be2a63d4bf5a92d63c4be5a12d73c5be2a12d7bf5a92a63c4be5a02d63c4be2a1"
    )


@pytest.mark.parametrize("n, absmax, last_bytes", [(70, 0.65625, "6e18f2"), (69, 0.65625, "6e18f7")])
def test_tail_bytes(n, absmax, last_bytes):
    packed, state = F.quantize_4bit(S[:n], blocksize=64, quant_type="nf4")
    assert state.absmax[1].item() == absmax
    assert raw_bytes(packed).hex().endswith(last_bytes)


@pytest.mark.parametrize(
    "quant_type, dtype, digest",
    [
        ("nf4", torch.float32, "408981aa687dbec5bfc0294f"),
        ("nf4", torch.float16, "fe1dce013d0e244a4ac4a582"),
        ("nf4", torch.bfloat16, "ee68e3e171888ae9932270ff"),
        ("fp4", torch.float32, "5cbeab877c27a11d5481b95e"),
        ("fp4", torch.float16, "eb59ea9866e595a50f3bf88f"),
        ("fp4", torch.bfloat16, "d6650fc41e103d48419b75d7"),
    ],
    ids=short_name,
)
def test_digest_of_dequantised(quant_type, dtype, digest):
    packed, state = F.quantize_4bit(S.view(2, 64), blocksize=64, quant_type=quant_type)
    assert sha(torch.ops.bitsandbytes.dequantize_4bit(packed, state.absmax, 64, quant_type, [2, 64], dtype)) == digest


@pytest.mark.parametrize(
    "quant_type, blocksize, digest",  # not FP4 in blocks of 4096, where the input has a negative tie
    [
        ("nf4", 32, "68b1b98d091e144366c36627"),
        ("nf4", 64, "e0587466ca4d8aedd399954b"),
        ("nf4", 4096, "4cd0989829b2dd8b6a4486f3"),
        ("fp4", 32, "9660bd1105677c434b834a97"),
        ("fp4", 64, "6450f8955b36f70b94c9d659"),
    ],
)
def test_digest_of_packed(quant_type, blocksize, digest):
    packed, _ = F.quantize_4bit(BIG, blocksize=blocksize, quant_type=quant_type)
    if quant_type == "fp4":  # the published bytes have the second zero wherever a positive value rounds to zero
        codes = unpack(packed, BIG.numel())
        codes[(codes == 0) & (BIG > 0)] = 8
        packed = codes[0::2] << 4 | codes[1::2]
    assert sha(packed) == digest


@pytest.mark.parametrize("blocksize, digest", [(32, "c337c353ce89f155fef14c02"), (64, "909b9626f17751497febf07f")])
def test_digest_of_absmax(blocksize, digest):
    assert sha(F.quantize_4bit(BIG, blocksize=blocksize, quant_type="nf4")[1].absmax) == digest


# --------------------------------------------------------------------------------------------------------------------------------- 8 bit
@pytest.mark.parametrize("name", cases.eight_bit())
def test_quantize_blockwise(eight_bit, name):
    case = cases.eight_bit()[name]
    codes, state = F.quantize_blockwise(case.input(), code=case.code(F), blocksize=case.blocksize)
    assert_same_bits(codes, eight_bit[f"{name}.codes"])
    assert_same_bits(state.absmax, eight_bit[f"{name}.absmax"])


@pytest.mark.parametrize("name", cases.eight_bit())
def test_dequantize_blockwise(eight_bit, name):
    case = cases.eight_bit()[name]
    codes, absmax = eight_bit[f"{name}.codes"], eight_bit[f"{name}.absmax"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, case.code(F), case.blocksize, dtype)
        assert_same_bits(values, eight_bit[f"{name}.{short_name(dtype)}"])


@pytest.mark.parametrize(
    "signed, blocksize, codes_digest, absmax_digest",
    [
        (True, 256, "c3ca0f993a8fd6bb04d5629d", "0f677f1deffd058d3352a8ec"),
        (True, 4096, "f54b98a9f1803e0c1d31dbda", "1207bb37f1db67f8e4994169"),
        (False, 256, "24dd70cc8c049baec4d706f3", "0f677f1deffd058d3352a8ec"),
        (False, 4096, "07786d1d46458256b2937996", "1207bb37f1db67f8e4994169"),
    ],
)
def test_digest_of_8bit_codes(signed, blocksize, codes_digest, absmax_digest):
    codes, state = F.quantize_blockwise(BIG, code=F.create_dynamic_map(signed=signed), blocksize=blocksize)
    assert sha(codes) == codes_digest
    assert sha(state.absmax) == absmax_digest


def test_8bit_codes_in_full():
    codes, _ = F.quantize_blockwise(S, blocksize=64)
    assert raw_bytes(codes[:32]).hex() == "0034da0e4ee81cc1f62ad00438de127fec20c6fa2ed4083de216b0f024caff33"


# ---------------------------------------------------------------------------------------------------------------- decided differently
@pytest.mark.parametrize("name", cases.departures())
def test_departure_from_the_published_result(name):
    """Each departure is real (one of the published kernel sets decides otherwise), and ours is what the rule says."""
    case = cases.departures()[name]
    codes, absmax = case.quantize(F)
    published = [load_file(GOLDEN / f"departures_{kernels}.safetensors", device=DEVICE) for kernels in ("native", "torch")]
    ours = raw_bytes(codes), raw_bytes(absmax)
    assert any((raw_bytes(p[f"{name}.codes"]), raw_bytes(p[f"{name}.absmax"])) != ours for p in published), case.reason

    if case.quant_type:
        expected_codes, expected_absmax = model_quantize_4bit(case.input(), case.blocksize, case.quant_type)
    else:
        expected_codes, expected_absmax = model_quantize_blockwise(case.input(), F.create_dynamic_map(), case.blocksize)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(absmax, expected_absmax)


# ---------------------------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("name", cases.states())
def test_packed_state(name):
    case, recorded = cases.states()[name], json.loads((GOLDEN / "states.json").read_text())[name]
    _, state = F.quantize_4bit(case.input(), blocksize=case.blocksize, quant_type=case.quant_type, compress_statistics=case.nested)
    packed = state.as_dict(packed=True)
    assert list(packed) == recorded["packed_keys"]
    assert list(state.as_dict()) == recorded["plain_keys"]
    assert raw_bytes(packed[f"quant_state.bitsandbytes__{case.quant_type}"]) == recorded["json"].encode()


# ------------------------------------------------------------------------------------------------------------------------------ checkpoints
def checkpoint(name: str) -> dict[str, torch.Tensor]:
    """A recorded state dict, in the order in which the published library wrote its keys."""
    tensors = load_file(GOLDEN / f"layer_{name}.safetensors", device=DEVICE)
    order = about(GOLDEN / "layer_results.safetensors")[name]
    assert set(order) == set(tensors)
    return {key: tensors[key] for key in order}


def assert_computes_the_same(layer, case, expected):
    """Up to the order of the additions, and one rounding of a 16-bit result."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(mode)(case.x()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", cases.layers())
@pytest.mark.parametrize("destination", ["new", "quantised"])
def test_checkpoint_loads(name, destination):
    case = cases.layers()[name]
    layer = case.empty(bnb)
    if destination == "quantised":
        layer = layer.to(DEVICE)
    result = layer.load_state_dict(checkpoint(name), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert layer.weight.quant_state.dtype == case.dtype
    assert_computes_the_same(layer, case, load_file(GOLDEN / "layer_results.safetensors", device=DEVICE)[name])


@pytest.mark.parametrize("name", cases.layers())
def test_checkpoint_is_written_back_byte_for_byte(name, tmp_path):
    layer = cases.layers()[name].empty(bnb)
    layer.load_state_dict(checkpoint(name))
    assert_file_equals_recorded(layer, name, tmp_path)


@pytest.mark.parametrize("name", cases.layers())
def test_checkpoint_of_newly_quantised_layer_is_byte_for_byte_the_published_one(name, tmp_path):
    assert_file_equals_recorded(cases.layers()[name].quantised(bnb), name, tmp_path)


def assert_file_equals_recorded(layer, name, tmp_path):
    state_dict = layer.state_dict()
    assert list(state_dict) == list(checkpoint(name))
    save_file(state_dict, tmp_path / "layer.safetensors")
    assert (tmp_path / "layer.safetensors").read_bytes() == (GOLDEN / f"layer_{name}.safetensors").read_bytes()


def test_torch_save_checkpoint_loads():
    case = cases.layers()[cases.PICKLED_LAYER]
    state_dict = torch.load(GOLDEN / "layer.pt", weights_only=True, map_location=DEVICE)
    layer = case.empty(bnb)
    layer.load_state_dict(state_dict)
    assert_computes_the_same(layer, case, load_file(GOLDEN / "layer_results.safetensors", device=DEVICE)[cases.PICKLED_LAYER])
    ours = cases.layers()[cases.PICKLED_LAYER].quantised(bnb).state_dict()
    assert list(ours) == list(state_dict)
    for key, tensor in ours.items():
        assert_same_bits(tensor, state_dict[key])


@pytest.mark.parametrize("name", cases.layers())
def test_from_prequantized_reads_checkpoint(name):
    case, tensors = cases.layers()[name], checkpoint(name)
    statistics = {key: value for key, value in tensors.items() if key.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], statistics, device=DEVICE)
    expected = case.quantised(bnb).weight
    assert weight.quant_type == case.quant_type and weight.quant_storage == case.storage and weight.compress_statistics == case.nested
    assert_same_bits(F.dequantize_4bit(weight.data, weight.quant_state), F.dequantize_4bit(expected.data, expected.quant_state))


LOAD_WITH_PUBLISHED = """
import sys
from safetensors.torch import load_file, save_file
import bitsandbytes as bnb
assert bnb.__version__ == "0.50.2", bnb.__file__
from pathlib import Path
results = {}
for path in sorted(Path(sys.argv[1]).glob("layer_*.safetensors")):
    tensors = load_file(path)
    statistics = {key: value for key, value in tensors.items() if key.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], statistics, device="cpu")
    results[path.stem] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).contiguous()
save_file(results, sys.argv[2])
"""


@pytest.mark.skipif(not PUBLISHED_PYTHON, reason="BNB_PUBLISHED_PYTHON does not name an interpreter with bitsandbytes 0.50.2")
def test_published_library_reads_our_checkpoints(tmp_path):
    expected = {}
    for name, case in cases.layers().items():
        if case.in_features % case_blocksize(case):
            continue  # the published CPU kernel misplaces the scales of such rows
        layer = case.quantised(bnb)
        save_file(layer.state_dict(), tmp_path / f"layer_{name}.safetensors")
        expected[f"layer_{name}"] = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = run_python(LOAD_WITH_PUBLISHED, str(tmp_path), str(tmp_path / "out"), interpreter=PUBLISHED_PYTHON, env=clean, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out", device=DEVICE)
    assert set(theirs) == set(expected)
    for name, values in expected.items():
        assert_same_bits(theirs[name], values)


def case_blocksize(case) -> int:
    return case.empty(bnb).weight.blocksize


# ------------------------------------------------------------------------------------------------------------------- a model by transformers
def small_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**cases.LLAMA_CONFIG)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_model_saved_by_transformers_and_published_library_loads_by_state_dict():
    model = small_llama()
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and child_name != "lm_head":
                size = (child.in_features, child.out_features)
                setattr(module, child_name, bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4"))
    recorded = load_file(GOLDEN / "llama" / "model.safetensors", device=DEVICE)
    result = model.load_state_dict(recorded)
    assert not result.missing_keys and not result.unexpected_keys
    ours = model.state_dict()
    assert set(ours) == set(recorded)
    for key, tensor in recorded.items():
        assert_same_bits(ours[key], tensor)
    assert_logits(model)


def test_model_saved_by_transformers_and_published_library_loads_by_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_bitsandbytes_available():
        pytest.skip("transformers sees bitsandbytes only when it is installed, not from the source tree")
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("logits*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE)
    assert_logits(model)
    model.save_pretrained(tmp_path / "again", save_original_format=False)  # transformers cannot undo its own conversion of 4-bit weights
    again, recorded = (load_file(folder / "model.safetensors", device=DEVICE) for folder in (tmp_path / "again", GOLDEN / "llama"))
    assert set(again) == set(recorded)
    for key, tensor in recorded.items():
        assert_same_bits(again[key], tensor)


def assert_logits(model):
    expected = load_file(GOLDEN / "llama" / "logits.safetensors", device=DEVICE)["logits"]
    for mode in (True, False):
        with torch.no_grad():
            logits = model.train(mode)(cases.llama_tokens()).logits
        error = (logits.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2, f"relative error {error}"


def test_recorded_inputs_are_the_same_numbers_everywhere():
    """The formulas behind the recorded inputs: a change here would make every recording meaningless."""
    assert sha(bell(4096, seed=1)) == "b67d39f6f0b0d440fb131803"
    assert sha(BIG) == "3a7bd37964464c5d367dbe75"
