"""What `cpu_benchmark.py` measures, and the worker process that measures it.

A worker is this file run by the interpreter whose bitsandbytes is to be measured. It uses the public interface only, so that the
same lines run with this library and with the published one. It reads one JSON request a line from stdin and answers on stdout:

    {"run": "<case>", "seconds": 0.3}   -> {"seconds": <median time of one call>}
    {"forget": "<case>"}                -> {}
    {"memory": true}                    -> {"extra": <extra memory of quantize_4bit as a fraction of its input>}

Every case is built once a worker from the same seed, warmed up, and then timed call by call. Each call makes new result tensors;
calls that take less than a millisecond are timed in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import gc
import json
import logging
import os
from pathlib import Path
import statistics
import sys
import time

import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F

SIDE = 4096  # weights are SIDE x SIDE: 16.8M elements
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_ROWS, TRAINING_ROWS_8BIT = 64, 128
EMBEDDING_ROWS, EMBEDDING_TOKENS = 50_000, 512


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        build: prepares the data and returns the function to time.
        traffic: the bytes that have to be read and written at least once.
        published: whether the published library is measured too (dense layers and torch.optim are PyTorch alone).
    """

    build: Callable[[], Callable[[], object]]
    traffic: int
    published: bool = True


def random_matrix(dtype: str, rows: int = SIDE, columns: int = SIDE) -> torch.Tensor:
    """Normal random numbers, the same in every worker."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])


def width(dtype: str) -> int:
    """Bytes of an element."""
    return DTYPES[dtype].itemsize


def packed_bytes(elements: int, blocksize: int = 64) -> int:
    """Size of a 4-bit weight with fp32 block scales."""
    return elements // 2 + 4 * (elements // blocksize)


def int8_bytes(elements: int, columns: int = SIDE) -> int:
    """Size of an int8 weight with a fp32 scale a row."""
    return elements + 4 * (elements // columns)


# --- builders: everything above the returned function is preparation ---------------------------------------------------------


def build_quantize_4bit(dtype: str):
    return partial(F.quantize_4bit, random_matrix(dtype), blocksize=64, quant_type="nf4")


def build_dequantize_4bit(dtype: str):
    return partial(F.dequantize_4bit, *F.quantize_4bit(random_matrix(dtype), blocksize=64, quant_type="nf4"))


def build_quantize_blockwise(dtype: str):
    return partial(F.quantize_blockwise, random_matrix(dtype))


def build_dequantize_blockwise(dtype: str):
    return partial(F.dequantize_blockwise, *F.quantize_blockwise(random_matrix(dtype)))


def quantised_layer(dtype: str, side: int = SIDE):
    layer = bnb.nn.Linear4bit(side, side, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4", compress_statistics=False)
    layer.weight.data.copy_(random_matrix(dtype, side, side))
    return layer.to("cpu")


def int8_layer(dtype: str, side: int = SIDE):
    layer = bnb.nn.Linear8bitLt(side, side, bias=False, has_fp16_weights=False)
    weight = bnb.nn.Int8Params(random_matrix(dtype, side, side), requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to("cpu")  # quantises, with every library
    return layer


def dense_layer(dtype: str, side: int = SIDE):
    layer = torch.nn.Linear(side, side, bias=False, dtype=DTYPES[dtype])
    layer.weight.data.copy_(random_matrix(dtype, side, side))
    return layer


def build_inference(make_layer, dtype: str, rows: int, side: int = SIDE, layers: int = 1):
    """A forward pass without gradients. With several layers, each call uses the next: the weights then come from memory, not from cache."""
    stack = [make_layer(dtype, side).eval().requires_grad_(False) for _ in range(layers)]
    x = random_matrix(dtype, rows, side)
    turn = 0

    def call():
        nonlocal turn
        turn = (turn + 1) % layers
        with torch.no_grad():
            return stack[turn](x)

    for _ in stack:
        call()  # a layer may prepare itself in its first call
    return call


def build_embedding(rows: int, columns: int, tokens: int):
    """A lookup in a table in NF4."""
    table = bnb.nn.EmbeddingNF4(rows, columns, dtype=torch.float32)
    table.weight = bnb.nn.Params4bit(random_matrix("fp32", rows, columns), requires_grad=False, quant_type="nf4", compress_statistics=False)
    table = table.to("cpu")
    ids = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(1))
    return partial(table, ids)


def build_training(make_layer, dtype: str, rows: int):
    """Forward and backward for the activations, as an adapter below the frozen layer needs it."""
    layer = make_layer(dtype).train().requires_grad_(False)
    x = random_matrix(dtype, rows).requires_grad_()
    grad = random_matrix(dtype, rows)

    def call():
        x.grad = None
        layer(x).backward(grad)
        return x.grad

    return call


def build_generate(tokens: int, **quantisation):
    """Greedy generation of so many tokens with SmolLM2-135M-Instruct, quantised as transformers is told to."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**quantisation)
    folder = os.environ["BENCHMARK_MODEL"]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, quantization_config=config).eval()
    prompt = torch.arange(100, 132)[None]
    options = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), **options)


def build_step(optimizer: str, elements: int = SIDE * SIDE, parameters: int = 1):
    """A step over fp32 parameters. `optimizer` is a class of bitsandbytes.optim, or "torch" for the fused AdamW of PyTorch."""
    weights = [torch.nn.Parameter(random_matrix("fp32", 1, elements)) for _ in range(parameters)]
    for weight in weights:
        weight.grad = random_matrix("fp32", 1, elements) * 1e-3
    if optimizer == "torch":
        return torch.optim.AdamW(weights, fused=True).step
    return getattr(bnb.optim, optimizer)(weights).step


# --- the table ---------------------------------------------------------------------------------------------------------------


def all_cases() -> dict[str, Case]:
    """Every case by name."""
    elements = SIDE * SIDE
    table: dict[str, Case] = {}
    for dtype in DTYPES:
        dense, packed, bytewise = elements * width(dtype), packed_bytes(elements), elements + 4 * (elements // 4096)
        table[f"quantize_4bit {dtype}"] = Case(partial(build_quantize_4bit, dtype), dense + packed)
        table[f"dequantize_4bit {dtype}"] = Case(partial(build_dequantize_4bit, dtype), dense + packed)
        table[f"quantize_blockwise {dtype}"] = Case(partial(build_quantize_blockwise, dtype), dense + bytewise)
    # The 8-bit state always dequantises to fp32.
    table["dequantize_blockwise fp32"] = Case(partial(build_dequantize_blockwise, "fp32"), 4 * elements + bytewise)
    for dtype, all_rows in (("bf16", (1, 4, 16, 128, 512)), ("fp32", (1, 4, 16, 64, 128, 512))):
        for rows in all_rows:
            activations = 2 * rows * SIDE * width(dtype)
            table[f"Linear4bit {dtype} M={rows}"] = Case(partial(build_inference, quantised_layer, dtype, rows), packed_bytes(elements) + activations)
            table[f"nn.Linear {dtype} M={rows}"] = Case(
                partial(build_inference, dense_layer, dtype, rows), elements * width(dtype) + activations, published=False
            )
    table["Linear4bit bf16 M=1 uncached"] = Case(
        partial(build_inference, quantised_layer, "bf16", 1, layers=12), packed_bytes(elements) + 2 * SIDE * width("bf16")
    )
    table["nn.Linear bf16 M=1 uncached"] = Case(
        partial(build_inference, dense_layer, "bf16", 1, layers=12), elements * 2 + 2 * SIDE * width("bf16"), published=False
    )
    for dtype in DTYPES:
        activations = 4 * TRAINING_ROWS * SIDE * width(dtype)
        table[f"training {dtype} M={TRAINING_ROWS}"] = Case(
            partial(build_training, quantised_layer, dtype, TRAINING_ROWS), 2 * packed_bytes(elements) + activations
        )
    for rows in (1, 16, 128, 512):
        activations = 2 * rows * SIDE * width("bf16")
        table[f"Linear8bitLt bf16 M={rows}"] = Case(partial(build_inference, int8_layer, "bf16", rows), int8_bytes(elements) + activations)
    activations = 4 * TRAINING_ROWS_8BIT * SIDE * width("bf16")
    table[f"training int8 bf16 M={TRAINING_ROWS_8BIT}"] = Case(
        partial(build_training, int8_layer, "bf16", TRAINING_ROWS_8BIT), 2 * int8_bytes(elements) + activations
    )
    for columns in (576, 65):  # the second fits no block
        read_and_written = EMBEDDING_TOKENS * (packed_bytes(columns) + 4 * columns)
        build = partial(build_embedding, EMBEDDING_ROWS, columns, EMBEDDING_TOKENS)
        table[f"EmbeddingNF4 {EMBEDDING_ROWS} x {columns}, {EMBEDDING_TOKENS} tokens"] = Case(build, read_and_written)
    # A step reads the gradient, and reads and writes the parameter and its moments: 8-bit ones have an fp32 scale for 256 elements.
    for optimizer, moments in (("Adam8bit", 2), ("AdamW8bit", 2), ("Lion8bit", 1), ("AdEMAMix8bit", 3), ("LAMB8bit", 2)):
        table[f"{optimizer} step"] = Case(partial(build_step, optimizer), elements * 12 + 2 * moments * (elements + elements // 64))
    for optimizer, moments in (("Adam", 2), ("AdamW", 2), ("Lion", 1)):
        table[f"{optimizer} step"] = Case(partial(build_step, optimizer), elements * (12 + 8 * moments))
    table["torch AdamW step"] = Case(partial(build_step, "torch"), elements * 28, published=False)
    table["AdamW8bit step, 400 x 4096"] = Case(partial(build_step, "AdamW8bit", 4096, 400), 400 * (4096 * 16 + 256))
    table["AdamW step, 400 x 4096"] = Case(partial(build_step, "AdamW", 4096, 400), 400 * 4096 * 28)
    table["torch AdamW step, 400 x 4096"] = Case(partial(build_step, "torch", 4096, 400), 400 * 4096 * 28, published=False)
    table["Linear4bit 64x64 bf16 M=1"] = Case(partial(build_inference, quantised_layer, "bf16", 1, side=64), packed_bytes(64 * 64) + 256)
    table["nn.Linear 64x64 bf16 M=1"] = Case(partial(build_inference, dense_layer, "bf16", 1, side=64), 64 * 64 * 2 + 256, published=False)
    if "BENCHMARK_MODEL" in os.environ:
        # The linear layers of SmolLM2-135M hold 106M weights; the tied output embedding of 49152 x 576 stays in bf16.
        weights, head = 106_168_320, 2 * 49152 * 576
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
        for name, tokens, quantisation, size in (("NF4", 32, nf4, packed_bytes(weights)), ("int8", 8, dict(load_in_8bit=True), int8_bytes(weights))):
            table[f"SmolLM2 {name} generate"] = Case(partial(build_generate, tokens, **quantisation), tokens * (size + head))
    return table


# --- the worker --------------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], object], repeats: int) -> float:
    """Mean time of one call over `repeats`. The last result is freed after the clock has stopped."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed / repeats


def measure(function: Callable[[], object], seconds: float) -> float:
    """Median time of a call, from about `seconds` of calls after a warm-up. Very short calls are timed in batches of a millisecond."""
    function()
    estimate = min(timed(function, 1) for _ in range(3))
    repeats = max(1, int(1e-3 / estimate))
    end = time.perf_counter() + seconds
    samples = []
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(timed(function, repeats))
    return statistics.median(samples)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy into memory that is already mapped: what this machine can move at best."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source).zero_()
    return 2 * source.nbytes / measure(lambda: target.copy_(source), 1.0)


def process_memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the memory in use, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no field {field}: memory can only be measured on Linux.")


def extra_memory() -> float:
    """Peak memory of quantize_4bit beyond its input and its results, as a fraction of the input. Wants a fresh process."""
    x = random_matrix("fp32")
    F.quantize_4bit(x[:8].clone(), quant_type="nf4")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = process_memory("VmRSS")
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    results = packed.nbytes + state.absmax.nbytes
    return max(0, process_memory("VmHWM") - before - results) / x.nbytes


def serve() -> None:
    """Answer requests until stdin closes. Whatever the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)  # the published 8-bit layer writes a line a call, which is not what is to be timed
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    cases, built = all_cases(), {}
    identity = {"bitsandbytes": bnb.__version__, "torch": torch.__version__, "file": bnb.__file__, "threads": torch.get_num_threads()}
    print(json.dumps(identity), file=answers, flush=True)
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if "run" in request:
            name = request["run"]
            if name not in built:
                built[name] = cases[name].build()
            answer = {"seconds": measure(built[name], request["seconds"])}
        elif "forget" in request:
            built.pop(request["forget"], None)
            gc.collect()
        elif "memory" in request:
            answer = {"extra": extra_memory()}
        elif "bandwidth" in request:
            answer = {"bytes_per_second": copy_bandwidth()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
