"""QuantState: all that is needed to undo a quantisation, and its two forms on disk.

The loose form is a flat dict of Python values and tensors. The packed form holds tensors only, so that it can live in a state dict or a
safetensors file: everything that is not a tensor goes as JSON into one uint8 tensor under the key ``quant_state.bitsandbytes__<type>``.
Both come from outside, so both are read with zero trust: what is missing, of the wrong type or out of range is reported by name.
"""

import copy
from math import prod
from typing import Any

import torch

from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

_FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class QuantState:
    """Statistics and format of a quantised tensor.

    Attributes:
        absmax: float32 [blocks], or uint8 codes [blocks] if the statistics are themselves quantised ("nested").
        shape: shape of the original tensor, or None (8-bit).
        code: float32 table of levels; 16 entries (4-bit) or 256 (8-bit).
        blocksize: number of consecutive elements that share an absmax.
        quant_type: "nf4", "fp4" or None (8-bit).
        dtype: dtype that dequantisation returns.
        offset: 0-dim mean that was subtracted from absmax before it was quantised; nested only.
        state2: QuantState of the quantised absmax; nested only.
        nested: whether the statistics are quantised.
    """

    # Pickles name a class by its module; this is where the published library has it, so that pickles travel both ways.
    __module__ = "bitsandbytes.functional"

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = [f"bitsandbytes__{name}" for name in valid_quant_types]
    valid_qs_keys = [
        "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type", "blocksize", "dtype", "shape",
        "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip

    # Whether the weight is in the published library's CPU layout (packing.py). A class attribute, so that every forward can ask cheaply.
    packing_format_for_cpu = False

    def __init__(self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    # ------------------------------------------------------------------------------------------------------------- as a list

    def __getitem__(self, index):
        """The state in the list form of early releases: [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __getattr__(self, name: str):
        # Keys of the packed form are looked up as attributes when a full state dict is gathered under FSDP.
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------------------------------------------------ comparison

    def __eq__(self, other) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.shape == other.shape
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and self.state2 == other.state2
        )

    __hash__ = None

    # ---------------------------------------------------------------------------------------------------------------- moving

    def to(self, device) -> None:
        """Moves all tensors to ``device``, in place. Whoever shares the object sees the move; ``moved_to`` leaves it alone."""
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        if self.nested:
            self.state2.to(device)

    def moved_to(self, device) -> "QuantState":
        """A new QuantState on ``device``; tensors that are there already are shared with this one."""
        moved = copy.copy(self)
        if moved.nested:
            moved.state2 = copy.copy(moved.state2)
        moved.to(device)
        return moved

    # --------------------------------------------------------------------------------------------------------------- writing

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a flat dict.

        Args:
            packed: put everything that is not a tensor into one uint8 tensor (4-bit states; 8-bit ones have no packed form and come loose).

        Returns:
            Keys are a subset of ``valid_qs_keys``; in the packed form ``quant_state.bitsandbytes__<quant_type>`` holds the JSON.
        """
        loose = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            loose |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),  # states share this table, safetensors refuses shared memory
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return loose
        tensors = {key: value for key, value in loose.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in loose.items() if key not in tensors}
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(rest)}

    # --------------------------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device) -> "QuantState":
        """Reads either form of ``as_dict``; keys may carry a prefix, the part after the last dot counts.

        Args:
            qs_dict: left as it is.
            device: where the tensors go.

        Raises:
            ValueError: no or several packed states; entries missing, of the wrong type, or that contradict each other.
            AssertionError: an entry that does not belong to a quantisation state.
        """
        loose = _loosen(qs_dict)
        unknown = set(loose) - set(cls.valid_qs_keys)
        if unknown:
            raise AssertionError(f"not entries of a quantisation state: {sorted(unknown)}")
        read = _Reader(loose, device)

        offset = state2 = None
        if "nested_absmax" in loose:
            offset = torch.tensor(read.number("nested_offset"), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=read.table("nested_absmax", torch.float32),
                code=read.table("nested_quant_map", torch.float32, size=256),
                blocksize=read.size("nested_blocksize"),
                dtype=read.dtype("nested_dtype"),
            )
        quant_type = loose.get("quant_type")
        if quant_type is not None and quant_type not in cls.valid_quant_types:
            raise ValueError(f"quant_type must be one of {cls.valid_quant_types}, got {quant_type!r}")
        state = cls(
            absmax=read.table("absmax", torch.uint8 if state2 else torch.float32),
            shape=read.shape(),
            code=read.table("quant_map", torch.float32, size=256 if quant_type is None else 16),
            blocksize=read.size("blocksize"),
            quant_type=quant_type,
            dtype=read.dtype("dtype"),
            offset=offset,
            state2=state2,
        )
        _check_lengths(state)
        return state


def _loosen(qs_dict: dict[str, Any]) -> dict[str, Any]:
    """Either form, with any prefix, as the loose form without prefix."""
    packed_keys = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, torch.Tensor)]
    if "quant_type" not in qs_dict:
        if not packed_keys:
            raise ValueError("found neither a packed nor an unpacked quantisation state")
        if len(packed_keys) != 1 or packed_keys[0].split(".")[-1] not in QuantState.valid_qs_type_keys:
            raise ValueError(f"expected exactly one key that ends in one of {QuantState.valid_qs_type_keys}, found {packed_keys}")

    loose = {key.split(".")[-1]: value for key, value in qs_dict.items() if key not in packed_keys[:1]}
    if packed_keys:
        values = _unpacked(packed_keys[0], qs_dict[packed_keys[0]])
        named, written = packed_keys[0].rpartition("__")[2], values.get("quant_type")
        if packed_keys[0].split(".")[-1] in QuantState.valid_qs_type_keys and named != written:
            raise ValueError(f"{packed_keys[0]} describes a weight of quant_type {written!r}")
        loose |= values
    return loose


def _unpacked(key: str, blob: torch.Tensor) -> dict[str, Any]:
    if blob.dtype != torch.uint8 or blob.is_meta:
        raise ValueError(f"{key} must be a uint8 tensor with data, got {blob.dtype} on {blob.device}")
    try:
        values = unpack_tensor_to_dict(blob)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not a packed quantisation state: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{key} must hold a JSON object, got {type(values).__name__}")
    return values


class _Reader:
    """Takes entries out of a loose dict, each checked for type and range. Tensors come out on ``device``."""

    def __init__(self, entries: dict[str, Any], device):
        self.entries = entries
        self.device = device

    def _get(self, key: str):
        if key not in self.entries:
            raise ValueError(f"the quantisation state lacks {key!r}")
        return self.entries[key]

    def table(self, key: str, dtype: torch.dtype, size: int | None = None) -> torch.Tensor:
        """A tensor. Floating tables may be stored in another precision (a model cast as a whole); they are read as float32."""
        value = self._get(key)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}")
        if value.is_floating_point() != dtype.is_floating_point or (not dtype.is_floating_point and value.dtype != dtype):
            raise ValueError(f"{key!r} must be {dtype}, got {value.dtype}")
        if value.layout != torch.strided or (value.is_meta and str(self.device) != "meta"):
            raise ValueError(f"{key!r} must be a dense tensor with data, got layout {value.layout} on {value.device}")
        if size is not None and value.numel() != size:
            raise ValueError(f"{key!r} must have {size} entries, got {value.numel()}")
        return value.to(device=self.device, dtype=dtype)

    def size(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{key!r} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{key!r} must be a number, got {value!r}")
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{key!r} must fit a float, got an integer of {value.bit_length()} bits") from error

    def dtype(self, key: str) -> torch.dtype:
        value = self._get(key)
        if value not in _FLOAT_DTYPES:
            raise ValueError(f"{key!r} must be one of {sorted(_FLOAT_DTYPES)}, got {value!r}")
        return _FLOAT_DTYPES[value]

    def shape(self) -> torch.Size | None:
        value = self._get("shape")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value):
            raise ValueError(f"'shape' must be a list of sizes, got {value!r}")
        return torch.Size(value)


def _check_lengths(state: QuantState) -> None:
    """absmax has one entry a block, the nested absmax one for each of its blocks."""
    if state.shape is not None:
        _check_length("absmax", state.absmax, prod(state.shape), state.blocksize)
    if state.nested:
        _check_length("nested_absmax", state.state2.absmax, state.absmax.numel(), state.state2.blocksize)


def _check_length(key: str, absmax: torch.Tensor, count: int, blocksize: int) -> None:
    needed = -(-count // blocksize)
    evened = needed + needed % 2  # the published Triton kernels write statistics for an even number of blocks
    if absmax.numel() not in (needed, evened):
        raise ValueError(f"{key!r} must have {needed} entries for {count} values in blocks of {blocksize}, got {absmax.numel()}")


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.allclose(a.float(), b.float(), atol=1e-6)
