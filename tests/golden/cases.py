"""The inputs whose results are recorded: shared by `record.py` (published library) and `test_golden.py` (this library)."""

from dataclasses import dataclass

from helpers import BLOCKSIZES_4BIT, DEVICE, FLOAT_DTYPES, QUANT_TYPES, STORAGE_DTYPES, bell, short_name
import torch

CODE_MAPS = {
    "dynamic": ("create_dynamic_map", ()),
    "dynamic_unsigned": ("create_dynamic_map", (False,)),
    "linear": ("create_linear_map", ()),
    "linear_unsigned": ("create_linear_map", (False,)),
    "normal": ("create_normal_map", ()),
    "normal_symmetric": ("create_normal_map", (0.9677083, False)),
    "fp8_e5m2": ("create_fp8_map", ()),
    "fp8_e4m3": ("create_fp8_map", (True, 4, 3, 8)),
    "fp8_unsigned_e5m3": ("create_fp8_map", (False, 5, 3, 8)),
    "fp4_e2m1": ("create_fp8_map", (True, 2, 1, 4)),
    **{f"dynamic_{bits}bit": ("create_dynamic_map", (True, bits - 1, bits)) for bits in range(2, 8)},
    **{f"dynamic_unsigned_{bits}bit": ("create_dynamic_map", (False, bits - 1, bits)) for bits in range(2, 8)},
    **{f"linear_{bits}bit": ("create_linear_map", (True, bits)) for bits in range(2, 8)},
    **{f"linear_unsigned_{bits}bit": ("create_linear_map", (False, bits)) for bits in range(2, 8)},
}


@dataclass(frozen=True)
class Quantise:
    """One input of quantize_4bit: `n` values of deviation `scale`, in blocks."""

    quant_type: str
    dtype: torch.dtype
    blocksize: int
    n: int
    seed: int = 1
    scale: float = 1.0
    storage: torch.dtype = torch.uint8
    nested: bool = False
    special: tuple = ()  # pairs (index, value) written over the input

    def input(self) -> torch.Tensor:
        x = bell(self.n, self.seed) * self.scale
        for index, value in self.special:
            x[index] = value
        return x.to(self.dtype)


def four_bit() -> dict[str, Quantise]:
    table = {}
    for quant_type in QUANT_TYPES:
        for dtype in FLOAT_DTYPES:
            for blocksize in BLOCKSIZES_4BIT:
                n = 2 * blocksize + 37  # two blocks and an odd tail
                table[f"{quant_type}.{short_name(dtype)}.{blocksize}"] = Quantise(quant_type, dtype, blocksize, n)
        for storage in STORAGE_DTYPES[1:]:
            table[f"{quant_type}.storage.{short_name(storage)}"] = Quantise(quant_type, torch.float32, 64, 512, seed=2, storage=storage)
        for n in (1, 2, 3, 31, 63, 64, 65):
            table[f"{quant_type}.size.{n}"] = Quantise(quant_type, torch.float32, 64, n, seed=3)
        for scale in (2.0**-100, 2.0**100):
            table[f"{quant_type}.scale.{scale:.0e}"] = Quantise(quant_type, torch.float32, 64, 256, seed=4, scale=scale)
        table[f"{quant_type}.zero_block"] = Quantise(quant_type, torch.float32, 64, 128, special=tuple((i, 0.0) for i in range(64)))
        table[f"{quant_type}.nan"] = Quantise(quant_type, torch.float32, 64, 128, special=((3, float("nan")),))
        table[f"{quant_type}.inf"] = Quantise(quant_type, torch.float32, 64, 128, special=((3, float("inf")), (70, float("-inf"))))
    return table


def nested() -> dict[str, Quantise]:
    """Whole blocks of 256 statistics, so that the tail rule does not enter."""
    return {f"nested.{t}": Quantise(t, torch.float32, 64, 64 * 256, seed=5, nested=True) for t in QUANT_TYPES}


@dataclass(frozen=True)
class Dequantise:
    """Every byte once, with scales from the smallest denormal to the largest number."""

    quant_type: str
    dtype: torch.dtype
    blocksize: int = 64
    n: int = 511

    def packed(self) -> torch.Tensor:
        return torch.arange(256, dtype=torch.uint8).reshape(-1, 1)

    def absmax(self) -> torch.Tensor:
        return torch.tensor([1.0, 0.7, 1e-45, 3e-39, 6e4, 1e-7, 3.4e38, 0.0])


def four_bit_dequantize() -> dict[str, Dequantise]:
    return {f"dequantise.{t}.{short_name(dtype)}": Dequantise(t, dtype) for t in QUANT_TYPES for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Blockwise:
    """One input of quantize_blockwise."""

    code_name: str
    dtype: torch.dtype
    blocksize: int
    n: int
    seed: int = 6

    def input(self) -> torch.Tensor:
        x = bell(self.n, self.seed)
        x[::97] = 0
        return (x.abs() if "unsigned" in self.code_name else x).to(self.dtype)

    def code(self, functional) -> torch.Tensor:
        function, args = CODE_MAPS[self.code_name]
        return getattr(functional, function)(*args)


def eight_bit() -> dict[str, Blockwise]:
    table = {}
    for code_name in ("dynamic", "dynamic_unsigned", "linear", "fp8_e5m2"):
        for dtype in FLOAT_DTYPES:
            for blocksize in (64, 256):
                table[f"{code_name}.{short_name(dtype)}.{blocksize}"] = Blockwise(code_name, dtype, blocksize, 2 * blocksize)
    table["dynamic.float32.4096"] = Blockwise("dynamic", torch.float32, 4096, 4096)
    table["dynamic.float32.100"] = Blockwise("dynamic", torch.float32, 100, 300)
    return table


@dataclass(frozen=True)
class Departure:
    """An input on which this library decides otherwise than the published one, and why."""

    reason: str
    blocksize: int
    values: tuple
    quant_type: str = ""  # empty: 8-bit with the default map

    def input(self) -> torch.Tensor:
        return torch.tensor(self.values, dtype=torch.float32)

    def quantize(self, functional) -> tuple[torch.Tensor, torch.Tensor]:
        if self.quant_type:
            packed, state = functional.quantize_4bit(self.input(), blocksize=self.blocksize, quant_type=self.quant_type)
        else:
            packed, state = functional.quantize_blockwise(self.input(), blocksize=self.blocksize)
        return packed, state.absmax


# each lies between a CUDA constant and the midpoint of its two levels
FP4_BETWEEN = (0.5833331942558289, 0.2083333432674408, 0.002604168374091387, 0.8333333730697632)
# absmax first; the others lie so that x / absmax and x * (1 / absmax) fall on two sides of a decision value
NF4_TAIL = (1.4554425477981567, -0.6694966554641724, -0.494383841753006, -0.3414575755596161, 0.057912278920412064, 0.73014235496521)
EIGHT_BIT_TAIL = (1.4554425477981567, -1.434975266456604, -1.332639455795288, -1.271238088607788, -1.1689022779464722, -1.0665664672851562)


def departures() -> dict[str, Departure]:
    zeros, halves = (0.0,) * 32, (1.0, 0.5) * 16
    tail = "the tail of a tensor is scaled as every other block is: by the reciprocal of its absmax"
    return {
        "nf4_zero_tail": Departure("a block of zeros has absmax 0, a short one too", 32, halves + zeros[:5], "nf4"),
        "eight_bit_zero_tail": Departure("a block of zeros has absmax 0, a short one too", 32, halves + zeros[:5]),
        "eight_bit_zero_block": Departure("a block of zeros gets the code whose value is 0", 32, zeros),
        "eight_bit_zero": Departure("zero is stored as the code whose value is 0", 32, halves[:31] + (0.0,)),
        "eight_bit_nan": Departure("a NaN makes its block NaN, so that the error stays visible", 32, halves[:31] + (float("nan"),)),
        "fp4_second_zero": Departure("zero has one code: small positive values do not become code 8", 32, halves[:30] + (0.001, -0.001), "fp4"),
        "fp4_negative_tie": Departure("a tie goes to the smaller magnitude, whatever the sign", 32, halves[:30] + (0.0859375, -0.0859375), "fp4"),
        "fp4_thresholds": Departure("the decision values are those of the published CUDA kernels", 32, halves[:28] + FP4_BETWEEN, "fp4"),
        "nf4_tail_division": Departure(tail, 32, halves + NF4_TAIL, "nf4"),
        "eight_bit_tail_division": Departure(tail, 32, halves + EIGHT_BIT_TAIL),
        "nf4_denormal_block": Departure("a block is scaled by its own absmax, however small", 32, tuple(x * 2.0**-140 for x in halves), "nf4"),
    }


def states() -> dict[str, Quantise]:
    return {
        f"{t}.{short_name(dtype)}.{'nested' if nested else 'flat'}": Quantise(t, dtype, 64, 64 * 256, seed=7, nested=nested)
        for t in QUANT_TYPES
        for dtype in FLOAT_DTYPES
        for nested in (False, True)
    }


@dataclass(frozen=True)
class Layer:
    """A Linear4bit, quantised from weights of which none is small enough for the second zero of FP4."""

    quant_type: str
    nested: bool
    storage: torch.dtype
    dtype: torch.dtype
    in_features: int = 128
    out_features: int = 128
    bias: bool = True
    seed: int = 37

    def weight(self) -> torch.Tensor:
        w = bell(self.out_features * self.in_features, self.seed)
        return (torch.where(w.abs() < 0.02, 0.0, w) / 16).reshape(self.out_features, self.in_features).to(self.dtype)

    def x(self) -> torch.Tensor:
        return bell(5 * self.in_features, self.seed + 100).reshape(5, self.in_features).to(self.dtype)

    def empty(self, bnb):
        """The layer with its recipe and unquantised weights."""
        options = dict(bias=self.bias, compute_dtype=self.dtype, compress_statistics=self.nested, quant_storage=self.storage)
        return bnb.nn.Linear4bit(self.in_features, self.out_features, quant_type=self.quant_type, **options).to(self.dtype)

    def quantised(self, bnb):
        layer = self.empty(bnb)
        layer.weight.data = self.weight()
        if self.bias:
            layer.bias.data = bell(self.out_features, self.seed + 200).to(self.dtype)
        return layer.to(DEVICE)


def layers() -> dict[str, Layer]:
    """FP4 not from bfloat16, in which ties, which are decided differently, are frequent."""
    table = {}
    for quant_type, dtypes in (("nf4", FLOAT_DTYPES), ("fp4", (torch.float32, torch.float16, torch.float32))):
        for nested in (False, True):
            for storage, dtype in zip((torch.uint8, torch.bfloat16, torch.float32), dtypes):
                name = f"{quant_type}_{'nested' if nested else 'flat'}_{short_name(storage)}"
                table[name] = Layer(quant_type, nested, storage, dtype, bias=storage is not torch.float32)
    table["nf4_odd"] = Layer("nf4", False, torch.uint8, torch.float32, in_features=33, out_features=11)
    return table


PICKLED_LAYER = "nf4_nested_uint8"


@dataclass(frozen=True)
class Int8Rows:
    """One input of int8_vectorwise_quant: values that float16 holds, in which the published library computes."""

    dtype: torch.dtype
    threshold: float
    rows: int = 6
    columns: int = 40
    seed: int = 8

    def input(self) -> torch.Tensor:
        x = bell(self.rows * self.columns, self.seed).reshape(self.rows, self.columns)
        x[:, 5] *= 6
        x[2] = 0
        return x.half().to(self.dtype)


def int8_rows() -> dict[str, Int8Rows]:
    dtypes = (torch.float16, torch.float32)
    return {f"{short_name(dtype)}.{threshold}": Int8Rows(dtype, threshold) for dtype in dtypes for threshold in (0.0, 2.5)}


@dataclass(frozen=True)
class Int8Layer:
    """A Linear8bitLt, quantised from a weight that float16 holds."""

    threshold: float
    in_features: int = 40
    out_features: int = 24
    seed: int = 9

    def x(self) -> torch.Tensor:
        return Int8Rows(torch.float16, self.threshold, 5, self.in_features, self.seed + 1).input()

    def empty(self, bnb):
        return bnb.nn.Linear8bitLt(self.in_features, self.out_features, has_fp16_weights=False, threshold=self.threshold).half()

    def quantised(self, bnb):
        layer = self.empty(bnb)
        layer.weight.data = (bell(self.in_features * self.out_features, self.seed) / 8).reshape(self.out_features, self.in_features).half()
        layer.bias.data = bell(self.out_features, self.seed + 2).half()
        return layer.to(DEVICE).eval()


def int8_layers() -> dict[str, Int8Layer]:
    return {"plain": Int8Layer(0.0), "threshold": Int8Layer(2.5)}


LLAMA_CONFIG = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def llama_tokens() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) * 37 % 96
