"""Every operator of the library, declared once: schema, argument checks, shape of the result.

Users reach them as ``torch.ops.bitsandbytes.<name>``. A declaration has three parts:

* the schema;
* the *check*, which sees the arguments of every call, fake or real, before any backend does. What passes it is safe to hand to native code:
  sizes, dtypes, devices and buffer lengths fit together. It raises RuntimeError and says what was wrong and what is needed. Plain
  comparisons: layers are called often, and on the symbolic sizes of torch.compile they become guards;
* the *fake kernel*, which makes empty results of the right shape for tracing. Operators with one result only name its shape and dtype.

Backends only implement: ``@implement("quantize_4bit", "cpu")`` above a function with the operator's arguments. Nothing here computes.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NoReturn

import torch
from torch.autograd import forward_ad

from .check_memo import once_for_alike
from .packing import is_cpu_layout, require_layout_holds

register_fake = torch.library.register_fake
register_kernel = torch.library.register_kernel

NAMESPACE = "bitsandbytes"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.uint8, *FLOATS)
QUANT_TYPES_4BIT = ("fp4", "nf4")
BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
OPTIMIZER_BLOCKSIZE = 256
CODE_SIZE = 256

# algorithm -> number of state tensors it needs. AdEMAMix keeps two moments in the first.
OPTIMIZER_STATES = {"adam": 2, "lamb": 2, "ademamix": 2, "momentum": 1, "lars": 1, "lion": 1, "rmsprop": 1, "adagrad": 1}

_CHECKS: dict[str, Callable] = {}
_NATIVE: dict[tuple[str, str], tuple[Callable, Callable]] = {}  # (operator, device type) -> check, kernel


# ---------------------------------------------------------------------------------------------------- declaring and implementing


def _declare(schema: str, check: Callable, result: Callable | None = None, fake: Callable | None = None, out: bool = False) -> None:
    """Declares an operator.

    Args:
        schema: name, arguments and results.
        check: called with the operator's arguments; raises if they are wrong.
        result: for operators with one result: arguments -> (shape, dtype); the device is that of the first argument.
        fake: for all others: arguments -> empty results.
        out: declare ``<name>.out`` as well, which writes into a tensor of the shape and dtype of ``result``.
    """
    name, signature = schema.split("(", 1)
    _define(name, "(" + signature, check, fake or (lambda A, *args, **kwargs: _empty(A, *result(A, *args, **kwargs))))
    if out:
        arguments = signature[: signature.rindex(") ->")]
        _define(f"{name}.out", f"({arguments}, Tensor! out) -> ()", _check_of_out_form(name, check, result), lambda *args, **kwargs: None)


def _define(name: str, signature: str, check: Callable, fake: Callable) -> None:
    def checked_fake(*args, **kwargs):
        try:
            check(*args, **kwargs)
        except AttributeError as error:
            raise _missing_tensor(name, error) from error
        return fake(*args, **kwargs)

    _CHECKS[name] = check
    torch.library.define(f"{NAMESPACE}::{name}", signature)
    register_fake(f"{NAMESPACE}::{name}")(checked_fake)


def _missing_tensor(name: str, error: AttributeError) -> TypeError:
    """The dispatcher lets None pass for any tensor, so that a check is the first to ask it for a dtype."""
    return TypeError(f"{name}: a tensor is needed where None was given ({error})")


def _empty(like: torch.Tensor, shape, dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _check_of_out_form(name: str, check: Callable, result: Callable) -> Callable:
    def check_out_form(A, *args, out=None, **kwargs):
        if out is None:
            *args, out = args
        check(A, *args, **kwargs)
        shape, dtype = result(A, *args, **kwargs)
        if tuple(out.shape) != tuple(shape):
            _fail(f"{name}: out must have shape {tuple(shape)}, got {tuple(out.shape)}")
        if out.dtype != dtype:
            _fail(f"{name}: out must be {dtype}, got {out.dtype}")
        _same_device(name, A, out)

    return check_out_form


def implement(name: str, device: str) -> Callable:
    """Registers the decorated function as the kernel of an operator.

    Args:
        name: operator, with ``.out`` for that form.
        device: "default" (any device; the reference) or a device type such as "cpu".

    Returns:
        A decorator that leaves the function as it is. The registered kernel runs the operator's check first.
    """
    check = _CHECKS[name]

    def register(kernel: Callable) -> Callable:
        def checked_kernel(*args, **kwargs):
            try:
                check(*args, **kwargs)
            except AttributeError as error:
                raise _missing_tensor(name, error) from error
            return kernel(*args, **kwargs)

        register_kernel(f"{NAMESPACE}::{name}", device)(checked_kernel)
        if device != "default":
            _NATIVE[name, device] = (check, kernel)
        return kernel

    return register


def invoke(name: str, A: torch.Tensor, *args):
    """Calls an operator outside autograd, sparing the dispatcher's detour where nobody would notice.

    The detour costs about 3 microseconds, half of a small layer's time. It is needed when something wants to see the call: tracing,
    torch.func transforms, dispatch modes (fake tensors, profiling by mode), tensor subclasses with a dispatch of their own. Otherwise the
    native kernel of the device is called, with the same checks.
    """
    native = _NATIVE.get((name, "cpu" if A.is_cpu else A.device.type))
    if native is not None and _nobody_watches() and _all_plain((A, *args)):
        check, kernel = native
        check(A, *args)
        return kernel(A, *args)
    return getattr(torch.ops.bitsandbytes, name)(A, *args)


def invoke_on_lists(name: str, lists: Sequence[Sequence[torch.Tensor]], **settings):
    """``invoke`` for an operator whose first arguments are lists of tensors, of which the first says the device."""
    first = lists[0][0] if lists[0] else None
    native = None if first is None else _NATIVE.get((name, first.device.type))
    if native is not None and _nobody_watches() and all(map(_all_plain, lists)):
        check, kernel = native
        check(*lists, **settings)
        return kernel(*lists, **settings)
    return getattr(torch.ops.bitsandbytes, name)(*lists, **settings)


_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_are_transforms_active = torch._C._are_functorch_transforms_active
_profiling = torch.autograd._profiler_enabled
_is_tracing = torch._C._is_tracing


def _nobody_watches() -> bool:
    watches = _is_compiling() or _dispatch_modes() or _function_modes() or _profiling() or _is_tracing() or _are_transforms_active()
    return not watches and forward_ad._current_level < 0


_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, int, float, str, bool, list, tuple, torch.Size, torch.dtype, type(None)}


def _all_plain(args: tuple) -> bool:
    """Whether no argument is a tensor subclass that dispatches by itself (DTensor, FakeTensor, ...). Learns the harmless subclasses."""
    types = set(map(type, args))
    if types <= _PLAIN_TYPES:
        return True
    if any(t.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in types - _PLAIN_TYPES if issubclass(t, torch.Tensor)):
        return False
    _PLAIN_TYPES.update(types)
    return True


# ----------------------------------------------------------------------------------------------------------- the rules of checks


def _fail(message: str) -> NoReturn:
    raise RuntimeError(message)


def _same_device(op: str, first, *others) -> None:
    device = first.device
    for tensor in others:
        if tensor is not None and tensor.device != device and not getattr(tensor, "is_paged", False):  # paged: any device reaches it
            _fail(f"{op}: all tensors must be on one device, got {device} and {tensor.device}")


def _require_dtype(op: str, name: str, tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        _fail(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def _require_float(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        _fail(f"{op}: {name} must be float16, bfloat16 or float32, got {dtype}")


def _require_at_least(op: str, name: str, tensor, needed) -> None:
    if tensor.numel() < needed:
        _fail(f"{op}: {name} holds {tensor.numel()} elements, {needed} are needed")


def _require_size(op: str, name: str, tensor, size) -> None:
    if tensor.numel() != size:
        _fail(f"{op}: {name} must have {size} elements, got {tensor.numel()}")


# The same for many tensors at once: optimizers have thousands.
def _require_dtypes(op: str, name: str, tensors, allowed: Sequence[torch.dtype]) -> None:
    for dtype in {tensor.dtype for tensor in tensors}:
        if dtype not in allowed:
            _fail(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {dtype}")


def _require_sizes(op: str, name: str, tensors, sizes: list) -> None:
    found = list(map(torch.Tensor.numel, tensors))
    if found != sizes:
        number, size, wanted = next((i, *pair) for i, pair in enumerate(zip(found, sizes)) if pair[0] != pair[1])
        _fail(f"{op}: {name} of parameter {number} must have {wanted} elements, got {size}")


def _require_positive_blocksize(op: str, blocksize: int) -> None:
    if blocksize <= 0:
        _fail(f"{op}: blocksize must be positive, got {blocksize}")


def _require_4bit_format(op: str, blocksize: int, quant_type: str | None = None) -> None:
    if blocksize not in BLOCKSIZES_4BIT:
        _fail(f"{op}: blocksize must be one of {BLOCKSIZES_4BIT}, got {blocksize}")
    if quant_type is not None and quant_type not in QUANT_TYPES_4BIT:
        _fail(f"{op}: quant_type must be 'fp4' or 'nf4', got {quant_type!r}")


def _require_code(op: str, code, size: int = CODE_SIZE) -> None:
    _require_dtype(op, "code", code, (torch.float32,))
    _require_size(op, "code", code, size)


def _require_packed(op: str, name: str, packed, count) -> None:
    """A buffer of any storage dtype that must hold ``count`` 4-bit codes."""
    if packed.dtype not in STORAGE_DTYPES:
        _fail(f"{op}: {name} must be uint8, float16, bfloat16 or float32 storage, got {packed.dtype}")
    capacity = packed.numel() * packed.element_size() * 2  # not nbytes, which symbolic sizes lack
    if capacity < count:
        _fail(f"{op}: {name} holds {capacity} 4-bit codes, {count} are needed")


def _require_absmax(op: str, absmax, count, blocksize: int) -> None:
    if absmax.dtype != torch.float32:
        _fail(f"{op}: absmax must be float32, got {absmax.dtype}")
    if absmax.numel() < blocks(count, blocksize):
        _fail(f"{op}: absmax holds {absmax.numel()} elements, {count} values in blocks of {blocksize} need {blocks(count, blocksize)}")


def _require_shape(op: str, shape) -> None:
    if any(size < 0 for size in shape):
        _fail(f"{op}: sizes must not be negative, got shape {tuple(shape)}")


def blocks(count, blocksize: int):
    """Number of blocks that ``count`` elements fill, a short last one included."""
    return (count + blocksize - 1) // blocksize


def packed_length(count, storage: torch.dtype):
    """Number of ``storage`` elements that hold ``count`` 4-bit codes."""
    return blocks((count + 1) // 2, storage.itemsize)


# ------------------------------------------------------------------------------------------------------------- 4-bit quantisation


def _check_quantize_4bit(A, blocksize, quant_type, quant_storage):
    _require_4bit_format("quantize_4bit", blocksize, quant_type)
    _require_float("quantize_4bit", "A", A.dtype)
    if quant_storage not in STORAGE_DTYPES:
        _fail(f"quantize_4bit: quant_storage must be one of {STORAGE_DTYPES}, got {quant_storage}")


def _fake_quantize_4bit(A, blocksize, quant_type, quant_storage):
    return (
        _empty(A, (packed_length(A.numel(), quant_storage), 1), quant_storage),
        _empty(A, (blocks(A.numel(), blocksize),), torch.float32),
    )


_declare(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _check_quantize_4bit,
    fake=_fake_quantize_4bit,
)


def _check_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    op = "dequantize_4bit"
    _require_4bit_format(op, blocksize, quant_type)
    _require_float(op, "dtype", dtype)
    _require_shape(op, shape)
    count = prod(shape)
    _require_packed(op, "A", A, count)
    _require_absmax(op, absmax, count, blocksize)
    _same_device(op, A, absmax)


_declare(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    _check_dequantize_4bit,
    result=lambda A, absmax, blocksize, quant_type, shape, dtype: (shape, dtype),
    out=True,
)


# ----------------------------------------------------------------------------------------------------------- 4-bit multiplication


def _check_product_shapes(op, A, B, shapeB, features):
    """A's last dimension is the weight's dimension ``features``: 1 for the forward product, 0 for the backward one."""
    if len(shapeB) != 2:
        _fail(f"{op}: shapeB must be (out_features, in_features), got {tuple(shapeB)}")
    if shapeB[0] < 0 or shapeB[1] < 0:
        _fail(f"{op}: sizes must not be negative, got shapeB {tuple(shapeB)}")
    _require_float(op, "A", A.dtype)
    if A.dim() < 1:
        _fail(f"{op}: A must have at least one dimension")
    if A.shape[-1] != shapeB[features]:
        _fail(f"{op}: A has {A.shape[-1]} features in its last dimension, the weight {tuple(shapeB)} expects {shapeB[features]}")
    _require_packed(op, "B", B, shapeB[0] * shapeB[1])


def _check_gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    op = "gemm_4bit"
    _check_product_shapes(op, A, B, shapeB, features=1)
    _check_4bit_weight(op, A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != shapeB[0]:
            _fail(f"{op}: bias must have shape ({shapeB[0]},), got {tuple(bias.shape)}")
        if bias.dtype != A.dtype:
            _fail(f"{op}: bias must have the dtype of A, {A.dtype}, got {bias.dtype}")
        if bias.device != A.device:
            _fail(f"{op}: bias is on {bias.device}, A on {A.device}")


def _check_4bit_weight(op, A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset):
    _require_4bit_format(op, blocksize, quant_type)
    count = blocks(shapeB[0] * shapeB[1], blocksize)
    if absmax_8bit is None:
        _require_absmax(op, absmax, shapeB[0] * shapeB[1], blocksize)
        _same_device(op, A, B, absmax)
        return
    if absmax_code is None or absmax_offset is None:
        _fail(f"{op}: absmax_8bit needs absmax_code and absmax_offset beside it")
    if absmax_8bit.dtype != torch.uint8 or absmax_8bit.numel() < count:
        _fail(f"{op}: absmax_8bit must be {count} uint8 codes, got {absmax_8bit.numel()} of {absmax_8bit.dtype}")
    _require_absmax(op, absmax, count, NESTED_BLOCKSIZE)
    if absmax_code.dtype != torch.float32 or absmax_code.numel() != CODE_SIZE:
        _fail(f"{op}: absmax_code must be {CODE_SIZE} float32 values, got {absmax_code.numel()} of {absmax_code.dtype}")
    if absmax_offset.dtype not in FLOATS or absmax_offset.numel() != 1:  # 16-bit offsets exist in old checkpoints
        _fail(f"{op}: absmax_offset must be one floating-point value, got {absmax_offset.numel()} of {absmax_offset.dtype}")
    if not (A.is_cpu and B.is_cpu and absmax.is_cpu and absmax_8bit.is_cpu and absmax_code.is_cpu and absmax_offset.is_cpu):  # the quick answer
        _same_device(op, A, B, absmax, absmax_8bit, absmax_code, absmax_offset)


_declare(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    _check_gemm_4bit,
    result=lambda A, B, shapeB, *args, **kwargs: ((*A.shape[:-1], shapeB[0]), A.dtype),
)


def _check_gemm_4bit_backward(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    op = "gemm_4bit_backward"
    _check_product_shapes(op, A, B, shapeB, features=0)
    _check_4bit_weight(op, A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)


# Gradient of gemm_4bit with respect to its input: A [..., out_features] times the weight as it stands. Not a published operator.
_declare(
    "gemm_4bit_backward(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    _check_gemm_4bit_backward,
    result=lambda A, B, shapeB, *args, **kwargs: ((*A.shape[:-1], shapeB[1]), A.dtype),
)


def _check_gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    op = "gemv_4bit"
    _require_4bit_format(op, blocksize)
    _check_product_shapes(op, A, B, shapeB, features=1)
    if is_cpu_layout(absmax):
        require_layout_holds(shapeB, blocksize)
        _require_size(op, "absmax", absmax, shapeB[0] * shapeB[1] // blocksize)
        _require_dtype(op, "B", B, (torch.uint8,))
        _require_size(op, "B", B, shapeB[0] * shapeB[1] // 2)
    else:
        _require_absmax(op, absmax, shapeB[0] * shapeB[1], blocksize)
    _require_code(op, code, 16)
    _same_device(op, A, B, absmax, code)


_declare(
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    _check_gemv_4bit,
    result=lambda A, B, shapeB, *args, **kwargs: ((*A.shape[:-1], shapeB[0]), A.dtype),
    out=True,
)


# ---------------------------------------------------------------------------------------------------- 8-bit blockwise quantisation


def _check_quantize_blockwise(A, code, blocksize):
    op = "quantize_blockwise"
    _require_positive_blocksize(op, blocksize)
    _require_float(op, "A", A.dtype)
    _require_code(op, code)
    _same_device(op, A, code)


_declare(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _check_quantize_blockwise,
    fake=lambda A, code, blocksize: (
        _empty(A, A.shape, torch.uint8),
        _empty(A, (blocks(A.numel(), blocksize),), torch.float32),
    ),
)


def _check_dequantize_blockwise(A, absmax, code, blocksize, dtype):
    op = "dequantize_blockwise"
    _require_positive_blocksize(op, blocksize)
    _require_dtype(op, "A", A, (torch.uint8,))
    _require_float(op, "dtype", dtype)
    _require_absmax(op, absmax, A.numel(), blocksize)
    _require_code(op, code)
    _same_device(op, A, absmax, code)


_declare(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _check_dequantize_blockwise,
    result=lambda A, absmax, code, blocksize, dtype: (A.shape, dtype),
    out=True,
)


# ------------------------------------------------------------------------------------------------------------------- LLM.int8


def _require_int8(op: str, **tensors) -> None:
    for name, tensor in tensors.items():
        _require_dtype(op, name, tensor, (torch.int8,))


def _rows(A):
    """Number of rows of a tensor seen as a matrix: everything but the last dimension."""
    return prod(A.shape[:-1])


def _require_stats(op: str, name: str, stats, count) -> None:
    _require_dtype(op, name, stats, (torch.float32,))
    _require_size(op, name, stats, count)


def _check_int8_vectorwise_quant(A, threshold=0.0, op="int8_vectorwise_quant"):
    _require_float(op, "A", A.dtype)
    if A.dim() < 1:
        _fail(f"{op}: A must have at least one dimension")
    if threshold < 0.0:
        _fail(f"{op}: threshold must not be negative, got {threshold}")


def _outlier_columns(A):
    """Fake list of outlier columns: how many there are depends on the data."""
    return _empty(A, (torch.library.get_ctx().new_dynamic_size(),), torch.int64)


_declare(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    _check_int8_vectorwise_quant,
    fake=lambda A, threshold=0.0: (
        _empty(A, A.shape, torch.int8),
        _empty(A, (_rows(A),), torch.float32),
        _outlier_columns(A) if threshold > 0.0 else None,
    ),
)


def _check_int8_double_quant(A, threshold=0.0):
    _check_int8_vectorwise_quant(A, threshold)


_declare(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _check_int8_double_quant,
    fake=lambda A, threshold=0.0: (
        _empty(A, A.shape, torch.int8),
        _empty(A, A.shape, torch.int8),
        _empty(A, (_rows(A),), torch.float32),
        _empty(A, (A.shape[-1],), torch.float32),
        _outlier_columns(A) if threshold > 0.0 else None,
    ),
)


def _check_int8_vectorwise_dequant(A, stats):
    op = "int8_vectorwise_dequant"
    _require_int8(op, A=A)
    if A.dim() < 1:
        _fail(f"{op}: A must have at least one dimension")
    _require_stats(op, "stats", stats, _rows(A))
    _same_device(op, A, stats)


_declare(
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    _check_int8_vectorwise_dequant,
    result=lambda A, stats: (A.shape, torch.float32),
)


def _check_int8_linear_matmul(A, B, op="int8_linear_matmul"):
    _require_int8(op, A=A, B=B)
    if A.dim() < 1 or B.dim() != 2:
        _fail(f"{op}: A needs at least 1 and B exactly 2 dimensions, got {A.dim()} and {B.dim()}")
    if A.shape[-1] != B.shape[-1]:
        _fail(f"{op}: inner dimensions differ, A {tuple(A.shape)} and B {tuple(B.shape)}")
    _same_device(op, A, B)


_declare(
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    _check_int8_linear_matmul,
    result=lambda A, B: ((*A.shape[:-1], B.shape[0]), torch.int32),
    out=True,
)


def _require_bias(op: str, bias, columns, device_of) -> None:
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != columns:
            _fail(f"{op}: bias must have shape ({columns},), got {tuple(bias.shape)}")
        _require_float(op, "bias", bias.dtype)
        _same_device(op, device_of, bias)


def _check_int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    op = "int8_mm_dequant"
    _require_dtype(op, "A", A, (torch.int32,))
    if A.dim() < 1:
        _fail(f"{op}: A must have at least one dimension")
    _require_float(op, "dtype", dtype or torch.float16)
    _require_stats(op, "row_stats", row_stats, _rows(A))
    _require_stats(op, "col_stats", col_stats, A.shape[-1])
    _require_bias(op, bias, A.shape[-1], A)
    _same_device(op, A, row_stats, col_stats)


_declare(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor",
    _check_int8_mm_dequant,
    result=lambda A, row_stats, col_stats, dtype=None, bias=None: (A.shape, dtype or torch.float16),
)


def _check_int8_scaled_mm(A, B, row_stats, col_stats, bias=None, dtype=None):
    op = "int8_scaled_mm"
    _check_int8_linear_matmul(A, B, op)
    _require_float(op, "dtype", dtype or torch.float16)
    _require_stats(op, "row_stats", row_stats, _rows(A))
    _require_stats(op, "col_stats", col_stats, B.shape[0])
    _require_bias(op, bias, B.shape[0], A)
    _same_device(op, A, row_stats, col_stats)


_declare(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    _check_int8_scaled_mm,
    result=lambda A, B, row_stats, col_stats, bias=None, dtype=None: ((*A.shape[:-1], B.shape[0]), dtype or torch.float16),
)


def _check_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    op = "int8_mixed_scaled_mm"
    _require_float(op, "A", A.dtype)
    _check_int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if tuple(A.shape) != tuple(CA.shape):
        _fail(f"{op}: A {tuple(A.shape)} and its codes CA {tuple(CA.shape)} must have one shape")
    if outlier_cols is not None:
        _require_dtype(op, "outlier_cols", outlier_cols, (torch.int64, torch.int32))
        if outlier_cols.dim() != 1:
            _fail(f"{op}: outlier_cols must be one-dimensional, got {tuple(outlier_cols.shape)}")
    _same_device(op, A, CA, outlier_cols)


def _fake_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    outliers = (0,) if outlier_cols is None else (_rows(A), outlier_cols.shape[0])
    return _empty(A, (*CA.shape[:-1], CB.shape[0]), A.dtype), _empty(A, outliers, A.dtype)


_declare(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)",
    _check_int8_mixed_scaled_mm,
    fake=_fake_int8_mixed_scaled_mm,
)


def _check_int8_weight(op, CB, SCB):
    _require_int8(op, CB=CB)
    if CB.dim() != 2:
        _fail(f"{op}: CB must be a weight (out_features, in_features), got {tuple(CB.shape)}")
    _require_stats(op, "SCB", SCB, CB.shape[0])


def _check_int8_linear(A, CB, SCB, bias=None, threshold=0.0):
    op = "int8_linear"
    _check_int8_vectorwise_quant(A, threshold, op)
    _check_int8_weight(op, CB, SCB)
    if A.shape[-1] != CB.shape[1]:
        _fail(f"{op}: A has {A.shape[-1]} features in its last dimension, the weight {tuple(CB.shape)} expects {CB.shape[1]}")
    _require_bias(op, bias, CB.shape[0], A)
    _same_device(op, A, CB, SCB)


# The whole product of an LLM.int8() layer. Outlier columns come back as a mask over the columns, whose size does not depend on the data; it is empty
# without a threshold. Not a published operator.
_declare(
    "int8_linear(Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0.0) -> (Tensor, Tensor)",
    _check_int8_linear,
    fake=lambda A, CB, SCB, bias=None, threshold=0.0: (
        _empty(A, (*A.shape[:-1], CB.shape[0]), A.dtype),
        _empty(A, (CB.shape[1] if threshold > 0.0 else 0,), torch.bool),
    ),
)


def _check_int8_linear_backward(grad, CB, SCB):
    op = "int8_linear_backward"
    _require_float(op, "grad", grad.dtype)
    if grad.dim() < 1:
        _fail(f"{op}: grad must have at least one dimension")
    _check_int8_weight(op, CB, SCB)
    if grad.shape[-1] != CB.shape[0]:
        _fail(f"{op}: grad has {grad.shape[-1]} features in its last dimension, the weight {tuple(CB.shape)} expects {CB.shape[0]}")
    _same_device(op, grad, CB, SCB)


# Gradient of int8_linear with respect to its input. Not a published operator.
_declare(
    "int8_linear_backward(Tensor grad, Tensor CB, Tensor SCB) -> Tensor",
    _check_int8_linear_backward,
    result=lambda grad, CB, SCB: ((*grad.shape[:-1], CB.shape[1]), grad.dtype),
)


# ------------------------------------------------------------------------------------------------------------------ optimizers


def _check_optimizer(op, name, g, p, states, state_dtype, step):
    if name not in OPTIMIZER_STATES:
        raise ValueError(f"{op}: unknown optimizer {name!r}; choose one of {sorted(OPTIMIZER_STATES)}")
    if step < 1:
        _fail(f"{op}: steps are counted from 1, got step {step}")
    _require_float(op, "g", g.dtype)
    if g.dtype != p.dtype:
        _fail(f"{op}: gradient and parameter must have one dtype, got {g.dtype} and {p.dtype}")
    _require_size(op, "g", g, p.numel())
    for i, state in enumerate(states, 1):
        if i > OPTIMIZER_STATES[name]:
            continue
        if state is None:
            _fail(f"{op}: {name} needs state{i}")
        _require_dtype(op, f"state{i}", state, (state_dtype,))
        _require_size(op, f"state{i}", state, _moments(name, i) * p.numel())
    _same_device(op, p, g, states[0], states[1])


def _moments(name: str, state: int) -> int:
    """How many values a parameter element has in a state tensor: AdEMAMix keeps its fast and its slow average in state1."""
    return 2 if name == "ademamix" and state == 1 else 1


def _check_optimizer_update_32bit(
    optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr,
    gnorm_scale, skip_zeros=False,
):  # fmt: skip
    op = "optimizer_update_32bit"
    _check_optimizer(op, optimizer_name, g, p, (state1, state2), torch.float32, step)
    if unorm_vec is not None:
        _require_dtype(op, "unorm_vec", unorm_vec, (torch.float32,))
        _require_at_least(op, "unorm_vec", unorm_vec, 1)
        _same_device(op, p, unorm_vec)
    if max_unorm > 0.0 and unorm_vec is None:
        _fail(f"{op}: max_unorm needs unorm_vec")


_declare(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, "
    "float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()",
    _check_optimizer_update_32bit,
    fake=lambda *args, **kwargs: None,
)


def _check_optimizer_update_8bit_blockwise(
    optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, weight_decay,
    gnorm_scale, skip_zeros=False,
):  # fmt: skip
    op = "optimizer_update_8bit_blockwise"
    _check_optimizer(op, optimizer_name, g, p, (state1, state2), torch.uint8, step)
    for i, (qmap, absmax) in enumerate(((qmap1, absmax1), (qmap2, absmax2)), 1):
        if i > OPTIMIZER_STATES[optimizer_name]:
            continue
        if qmap is None or absmax is None:
            _fail(f"{op}: {optimizer_name} needs qmap{i} and absmax{i}")
        _require_code(op, qmap)
        _require_dtype(op, f"absmax{i}", absmax, (torch.float32,))
        _require_size(op, f"absmax{i}", absmax, _moments(optimizer_name, i) * blocks(p.numel(), OPTIMIZER_BLOCKSIZE))
        _same_device(op, p, qmap, absmax)


_declare(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
    "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()",
    _check_optimizer_update_8bit_blockwise,
    fake=lambda *args, **kwargs: None,
)


def optimizer_moments(algorithm: str, beta2: float, amsgrad: bool, centered: bool) -> int:
    """How many moments ``optimizer_step`` keeps of a parameter."""
    return OPTIMIZER_STATES[algorithm] + (algorithm == "ademamix") + amsgrad + centered + (algorithm == "rmsprop" and beta2 > 0.0)


def _check_optimizer_step(
    p, g, moments, absmax, qmaps, unorm, algorithm, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale=1.0, max_unorm=0.0,
    skip_zeros=False, decoupled_weight_decay=True, bias_correction=True, nesterov=False, amsgrad=False, centered=False, seeds=(),
):  # fmt: skip
    op = "optimizer_step"
    if algorithm not in OPTIMIZER_STATES:
        raise ValueError(f"{op}: unknown optimizer {algorithm!r}; choose one of {sorted(OPTIMIZER_STATES)}")
    for name, wanted, algorithms in (
        ("amsgrad", amsgrad, ("adam", "lamb")), ("centered", centered, ("rmsprop",)), ("nesterov", nesterov, ("momentum", "lars")),
    ):  # fmt: skip
        if wanted and algorithm not in algorithms:
            raise ValueError(f"{op}: {name} is an option of {' and '.join(algorithms)}, not of {algorithm}")
    if step < 1:
        _fail(f"{op}: steps are counted from 1, got step {step}")
    count = optimizer_moments(algorithm, beta2, amsgrad, centered)
    lengths = {"g": (g, 1), "moments": (moments, count)}
    if qmaps:
        lengths["absmax"] = (absmax, count)
        if len(qmaps) != count:
            _fail(f"{op}: {algorithm} needs {count} code tables in qmaps, got {len(qmaps)}")
        for qmap in qmaps:
            _require_code(op, qmap)
    if max_unorm > 0.0:
        lengths["unorm"] = (unorm, 1)
    if seeds:
        lengths["seeds"] = (seeds, 1)
    for name, (items, each) in lengths.items():
        if len(items) != each * len(p):
            _fail(f"{op}: {len(p)} parameters need {each * len(p)} tensors (or numbers) in {name}, got {len(items)}")
    _check_tensors_of_optimizer_step(op, p, g, moments, absmax, qmaps, unorm, count)


@once_for_alike
def _check_tensors_of_optimizer_step(op, p, g, moments, absmax, qmaps, unorm, count):
    if not p:
        return
    sizes = list(map(torch.Tensor.numel, p))
    _require_float(op, "p", p[0].dtype)
    _require_dtypes(op, "the parameters of one call", p, (p[0].dtype,))
    _require_dtypes(op, "g", g, FLOATS)
    _require_sizes(op, "g", g, sizes)
    _require_dtypes(op, f"moments {'with' if qmaps else 'without'} qmaps", moments, (torch.uint8 if qmaps else torch.float32,))
    for i in range(count):
        _require_sizes(op, "moments", moments[i::count], sizes)
    if qmaps:
        of_blocks = [-(-n // OPTIMIZER_BLOCKSIZE) for n in sizes]
        _require_dtypes(op, "absmax", absmax, (torch.float32,))
        for i in range(count):
            _require_sizes(op, "absmax", absmax[i::count], of_blocks)
    _require_dtypes(op, "unorm", unorm, (torch.float32,))
    for norm in unorm:
        _require_at_least(op, "unorm", norm, 1)
    tensors = (*p, *g, *moments, *absmax, *qmaps, *unorm)
    for layout in {tensor.layout for tensor in tensors} - {torch.strided}:
        _fail(f"{op}: all tensors must be dense, got one with layout {layout}")
    if not all([tensor.is_cpu for tensor in tensors]):  # the quick answer
        _same_device(op, p[0], *tensors)


# One step of one algorithm over many parameters: everything that bitsandbytes.optim does to tensors. backends/default/optimizers.py says what
# it computes, operation by operation.
_declare(
    "optimizer_step(Tensor(a0!)[] p, Tensor[] g, Tensor(a1!)[] moments, Tensor(a2!)[] absmax, Tensor[] qmaps, Tensor(a3!)[] unorm, "
    "str algorithm, int step, float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
    "float gnorm_scale=1.0, float max_unorm=0.0, bool skip_zeros=False, bool decoupled_weight_decay=True, bool bias_correction=True, "
    "bool nesterov=False, bool amsgrad=False, bool centered=False, int[] seeds=[]) -> ()",
    _check_optimizer_step,
    fake=lambda *args, **kwargs: None,
)
