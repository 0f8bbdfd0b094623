"""Hypothesis strategies for what a damaged or malicious file may hold in place of what belongs there."""

import json
import math

from hypothesis import strategies as st
import torch

DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64,
)  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 32, 63, 64, 65, 255, 256, 257, 1024, 2048, 4096])
KINDS = ("zeros", "ones", "random", "nan", "meta", "strided", "expanded", "scalar", "sparse", "parameter")

numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 32, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30, True, False]),
    st.sampled_from([0.0, -0.0, 0.5, 64.0, 1e300, -1e300, math.inf, -math.inf, math.nan]),
    st.integers(-(2**65), 2**65),
    st.floats(),
)
words = st.sampled_from(
    ["", "nf4", "fp4", "NF4", "int8", "float16", "bfloat16", "float32", "float64", "torch.float16", "load", "__class__", "row", "\0"]
)
json_values = st.recursive(
    st.one_of(st.none(), numbers, words, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def tensors(draw) -> torch.Tensor:
    """A small tensor of any dtype, layout and shape."""
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(SIZES, min_size=0, max_size=2)))
    if math.prod(shape) > 2**16:
        shape = shape[:1]
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "scalar":
        return torch.ones((), dtype=dtype)
    if kind == "nan" and (dtype.is_floating_point or dtype.is_complex):
        return torch.full(shape, math.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = torch.zeros(shape, dtype=dtype) if kind == "zeros" else (torch.randn(shape, generator=generator) * 50).to(dtype)
    if kind == "strided":
        return torch.stack((values, values), dim=-1)[..., 0]
    if kind == "expanded" and values.numel():
        return values.reshape(-1)[:1].expand(draw(SIZES))
    if kind == "sparse" and values.dim():
        return values.to_sparse()
    return torch.nn.Parameter(values, requires_grad=dtype.is_floating_point) if kind == "parameter" else values


def damaged_tensors(original: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
    """The tensor cut, padded, cast, reshaped, with other values, elsewhere, or another one."""
    if original.layout != torch.strided or original.is_meta or not original.is_contiguous():  # damaged already
        return tensors()
    flat = original.reshape(-1)
    casts = [original.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8)]
    as_bytes = flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    changed = [flat[:-1], flat[:1], flat[:0], flat.flip(0), torch.cat((flat, flat[:1])), torch.cat((flat, flat)), as_bytes]
    changed += [original[None], original.t() if original.dim() == 2 else flat, original.to("meta"), torch.zeros_like(original)]
    if original.is_floating_point():
        changed += [torch.full_like(original, value) for value in (math.nan, math.inf, -1.0, 6e4)]
    return st.one_of(st.sampled_from(casts + changed), tensors())


@st.composite
def damaged_bytes(draw, original: torch.Tensor) -> torch.Tensor:
    """Packed JSON with bytes changed, cut or added, or with values changed."""
    data = bytearray(original.tolist())
    kind = draw(st.sampled_from(["values", "flips", "cut", "insert", "random"]))
    if kind == "values":
        values = json.loads(bytes(data))
        for _ in range(draw(st.integers(1, 3))):
            key = draw(st.sampled_from([*values, "bogus"]))
            if draw(st.booleans()):
                values[key] = draw(json_values)
            else:
                values.pop(key, None)
        data = bytearray(json.dumps(values).encode())
    elif kind == "flips":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif kind == "insert":
        at = draw(st.integers(0, len(data)))
        data[at:at] = draw(st.binary(max_size=20))
    else:
        data = bytearray(draw(st.binary(max_size=200)))
    return torch.tensor(list(data), dtype=torch.uint8)


@st.composite
def damaged_dicts(draw, original: dict) -> dict:
    """A dict of tensors and values with one to three entries taken away, renamed, exchanged or damaged."""
    damaged = dict(original)
    for _ in range(draw(st.integers(1, 3))):
        if not damaged:
            break
        key = draw(st.sampled_from(sorted(damaged, key=str)))
        kind = draw(st.sampled_from(["damage", "damage", "damage", "take", "rename", "exchange", "value"]))
        if kind == "take":
            del damaged[key]
        elif kind == "rename":
            names = ["weight", "x.weight", "absmax", "bogus", f"{key}.absmax", "quant_state.bitsandbytes__fp4"]
            damaged[draw(st.sampled_from(names))] = damaged.pop(key)
        elif kind == "exchange":
            other = draw(st.sampled_from(sorted(damaged, key=str)))
            damaged[key], damaged[other] = damaged[other], damaged[key]
        elif kind == "value":
            damaged[key] = draw(st.one_of(json_values, tensors()))
        elif isinstance(damaged[key], torch.Tensor):
            damaged[key] = draw(damaged_bytes(damaged[key]) if _is_json(damaged[key]) else damaged_tensors(damaged[key]))
        elif isinstance(damaged[key], dict):
            damaged[key] = draw(damaged_dicts(damaged[key]))
        elif isinstance(damaged[key], list):
            damaged[key] = draw(damaged_lists(damaged[key]))
        else:
            damaged[key] = draw(json_values)
    return damaged


@st.composite
def damaged_lists(draw, original: list) -> list:
    """A list with one entry damaged, taken away or added."""
    damaged = list(original)
    if not damaged or draw(st.booleans()):
        return draw(st.sampled_from([damaged[1:], damaged * 2, [*damaged, None]]))
    at = draw(st.integers(0, len(damaged) - 1))
    damaged[at] = draw(damaged_dicts(damaged[at])) if isinstance(damaged[at], dict) else draw(json_values)
    return damaged


def _is_json(blob: torch.Tensor) -> bool:
    if blob.dtype != torch.uint8 or not blob.is_cpu or blob.layout != torch.strided:
        return False
    try:
        return isinstance(json.loads(bytes(blob.reshape(-1).tolist())), dict)
    except ValueError:
        return False
