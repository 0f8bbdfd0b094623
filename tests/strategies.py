"""Hypothesis strategies for the inputs of quantisation: shapes, dtypes, and the values that break things."""

from helpers import FLOAT_DTYPES, bell
from hypothesis import strategies as st
import torch

KINDS = {
    "bell": lambda x: x,
    "tiny": lambda x: x * 2.0**-120,
    "denormal": lambda x: x * 2.0**-135,
    "huge": lambda x: x * 2.0**13,
    "one_sign": lambda x: -x.abs(),
    "zeros": lambda x: torch.zeros_like(x),
    "sparse": lambda x: torch.where(x.abs() > 1.5, x, 0.0),
    "steps": lambda x: (x * 3).round() / 4,  # many ties and many equal magnitudes
    "nan": lambda x: torch.where(x > 2.2, torch.nan, x),
    "inf": lambda x: torch.where(x.abs() > 2.2, x.sign() * torch.inf, x),
}

float_dtypes = st.sampled_from(FLOAT_DTYPES)
sizes = st.one_of(st.integers(0, 70), st.integers(71, 700), st.sampled_from([1023, 1024, 1025, 4095, 4096, 4097, 9000]))


@st.composite
def shapes(draw, size=sizes):
    """One to three dimensions with a product of about `size`, empty ones included."""
    n = draw(size)
    dims = draw(st.integers(1, 3))
    if dims == 1:
        return (n,)
    rows = draw(st.integers(1, 9))
    return (rows, n // rows) if dims == 2 else (rows, 1, n // rows)


@st.composite
def float_tensors(draw, shape=None, kinds=tuple(KINDS)):
    """A float tensor, sometimes a transposed or strided view."""
    shape = draw(shapes()) if shape is None else shape
    values = KINDS[draw(st.sampled_from(kinds))](bell(torch.Size(shape).numel(), seed=draw(st.integers(1, 1000))))
    x = values.reshape(shape).to(draw(float_dtypes))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"]))
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(shape)
    return x
