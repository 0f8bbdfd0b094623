"""Quantisation states read from damaged or malicious files: refused with a clear exception, and the caller's dict left as it was."""

import json
import random

from helpers import DEVICE, bell
import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes.functional import QuantState

KEY = "quant_state.bitsandbytes__nf4"


def packed_state(nested=True) -> dict:
    _, state = F.quantize_4bit(bell(64 * 64).reshape(64, 64), quant_type="nf4", compress_statistics=nested)
    return state.as_dict(packed=True)


def blob(text: str | bytes) -> torch.Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


def values_of(d: dict) -> dict:
    return json.loads(bytes(d[KEY].tolist()))


BLOBS = {
    "empty": b"",
    "not_utf8": b"\xff\xfe\x00{",
    "not_json": b"bitsandbytes",
    "truncated": b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 6',
    "trailing": b'{"quant_type": "nf4"} {}',
    "list": b"[1, 2]",
    "null": b"null",
    "number": b"12",
    "text": b'"nf4"',
    "deep": b'{"shape": ' + b"[" * 100_000,
    "deep_closed": b'{"shape": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long_number": b'{"blocksize": ' + b"9" * 10_000 + b"}",
    "empty_object": b"{}",
    "pickle": b"\x80\x04\x95",
}
CHANGED_VALUES = [
    *[("blocksize", v) for v in (0, -64, 64.0, 63.5, "64", None, True, [64], {}, 10**30, -(10**400), 2**63)],
    *[("dtype", v) for v in ("load", "save", "float64", "int32", "uint8", "__class__", "", None, 16, ["float16"], {}, "torch.float16", "nn")],
    *[("shape", v) for v in ("[64, 64]", 64, {}, [64, "64"], [64, 64.0], [64, -64], [-64, -64], [64, None], [True, 4096], [[64, 64]], [10**40])],
    *[("shape", v) for v in ([64, 65], [62, 64], [2**40, 64], [2**62, 2**62], [0])],
    *[("quant_type", v) for v in ("fp4", "nf5", "", None, 4, ["nf4"], {})],
    *[("nested_blocksize", v) for v in (0, -256, "256", None, 1, True, 10**40)],
    *[("nested_dtype", v) for v in ("load", None, [], "float64x")],
    *[("nested_offset", v) for v in ("0.1", None, [], {}, True, 10**400)],
    *[(key, None) for key in ("absmax", "quant_map", "nested_absmax", "bogus")],
    *[("absmax", v) for v in ([1, 2], "tensor", 1.0)],
]


def refused(d: dict):
    before = dict(d)
    with pytest.raises((ValueError, TypeError, AssertionError, RuntimeError)) as caught:
        QuantState.from_dict(d, DEVICE)
    assert not isinstance(caught.value, RecursionError) and len(str(caught.value)) > 15
    assert list(d) == list(before) and all(d[key] is before[key] for key in before), "the caller's dict was changed"


@pytest.mark.parametrize("name", BLOBS)
def test_blob_that_is_no_state_is_refused(name):
    refused(packed_state() | {KEY: blob(BLOBS[name])})


@pytest.mark.parametrize("key, value", CHANGED_VALUES, ids=lambda v: str(v)[:20])
def test_state_with_an_impossible_value_is_refused(key, value):
    d = packed_state()
    refused(d | {KEY: blob(json.dumps(values_of(d) | {key: value}))})


@pytest.mark.parametrize("key", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"])
def test_state_that_lacks_a_value_is_refused(key):
    d = packed_state()
    values = values_of(d)
    del values[key]
    refused(d | {KEY: blob(json.dumps(values))})


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", KEY])
def test_state_that_lacks_a_tensor_is_refused(key):
    d = packed_state()
    del d[key]
    refused(d)


@pytest.mark.parametrize(
    "key, tensor",
    [
        ("absmax", torch.zeros(63, dtype=torch.uint8)),
        ("absmax", torch.zeros(0, dtype=torch.uint8)),
        ("absmax", torch.zeros(4096, dtype=torch.uint8)),
        ("absmax", torch.zeros(64)),
        ("absmax", torch.zeros(64, dtype=torch.int8)),
        ("absmax", "absmax"),
        ("quant_map", torch.zeros(15)),
        ("quant_map", torch.zeros(256)),
        ("quant_map", torch.zeros(16, dtype=torch.int64)),
        ("quant_map", None),
        ("nested_absmax", torch.zeros(0)),
        ("nested_absmax", torch.zeros(3)),
        ("nested_absmax", torch.zeros(1, dtype=torch.uint8)),
        ("nested_quant_map", torch.zeros(255)),
        ("nested_quant_map", torch.zeros(16)),
        (KEY, torch.zeros(10)),
        (KEY, torch.zeros(10, dtype=torch.int64)),
        (KEY, torch.zeros(10, dtype=torch.uint8, device="meta")),
        ("unheard_of", torch.zeros(1)),
        ("quant_state.bitsandbytes__fp4", torch.zeros(1, dtype=torch.uint8)),
        ("quant_state.bitsandbytes__int2", torch.zeros(1, dtype=torch.uint8)),
    ],
    ids=lambda v: str(v)[:40].replace("\n", " "),
)
def test_state_with_a_wrong_tensor_is_refused(key, tensor):
    refused(packed_state() | {key: tensor})


@pytest.mark.parametrize("d", [{}, {"weight": torch.zeros(1)}, {"absmax": torch.zeros(1)}, {"quant_type": "nf4"}], ids=list)
def test_dict_without_a_state_is_refused(d):
    refused(d)


def test_key_of_another_type_than_its_text_is_refused():
    d = packed_state()
    text = d.pop(KEY)
    refused(d | {"quant_state.bitsandbytes__fp4": text})


def test_every_truncation_of_a_state_is_refused():
    d = packed_state()
    for length in range(d[KEY].numel()):
        refused(d | {KEY: d[KEY][:length]})


def test_random_damage_to_a_state_is_refused_or_harmless():
    d = packed_state()
    generator = random.Random(0)
    packed = torch.zeros(2048, 1, dtype=torch.uint8)
    for _ in range(300):
        damaged = d[KEY].clone()
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(damaged.numel())] = generator.randrange(256)
        try:
            state = QuantState.from_dict(d | {KEY: damaged}, DEVICE)
            F.dequantize_4bit(packed, state)
        except (ValueError, TypeError, AssertionError, RuntimeError):
            continue
