"""Finds the best kernel for 4-bit products and writes bitsandbytes/backends/cuda/gemm_4bit_table.py.

    python benchmarking/tune_gemm_4bit.py              measures on the GPU that is there, and replaces what the table says for its compute capability
    python benchmarking/tune_gemm_4bit.py --predict    fills the whole table from a model of the devices, for those that nobody has measured
    python benchmarking/tune_gemm_4bit.py --check      prints, for the GPU that is there, how far the table's choice is from the best

Every way to compute a product (kernel, tile, number of splits) is tried for shapes of common layers and numbers of tokens, besides dequantising and a
dense product. Weights rotate over more memory than the cache holds; a way's time is the median of CUDA-graph replays, or what the model says.
A way is measured only if its result is right. Products of warp groups rest on more of the hardware than a host can imitate: only a measurement
chooses them.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
from math import ceil
from pathlib import Path
import pprint
import statistics
from typing import NamedTuple

import torch

from bitsandbytes.backends.cuda.gemm_4bit_plan import KERNELS, Plan, backward_plan, forward_plan
from bitsandbytes.backends.cuda.gemm_4bit_table import TABLES

TABLE = Path(__file__).resolve().parent.parent / "bitsandbytes/backends/cuda/gemm_4bit_table.py"
SHAPES = [  # out features, in features: layers of Llama 3 8B and 70B, and small ones
    (1024, 1024), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (1024, 8192), (8192, 8192), (28672, 8192), (8192, 28672),
]  # fmt: skip
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
BLOCKSIZE = 64
SPLITS = [1, 2, 3, 4, 6, 8, 12, 16]
MOST_SPLIT_COLUMNS = 256  # a split should have more than that to do
PARTIAL_BYTES = 64 << 20
SLAB_BYTES = 64 << 20
SIMPLE_TOKENS = 8
DENSE = None  # in place of a plan
FUSED_TOKENS = {"forward": 64, "backward": 128}  # no dense weight up to here, whatever its speed: the memory is promised


class Device(NamedTuple):
    """What the model knows of a GPU: data-sheet figures; cycles are of one multiprocessor."""

    multiprocessors: int
    hertz: float
    bytes_per_second: float
    tensor_products: float  # multiply-adds a cycle with float sums
    dense_share: float  # of that rate, times what newer instructions add, which dense products reach
    shared_memory: int  # bytes
    launch: float = 2.5e-6
    group_products: float = 0  # multiply-adds a cycle by products of warp groups; 0: it has none


# Compute capability -> a representative. Products with float sums run at half the rate on consumer devices.
DEVICES = {
    75: Device(40, 1.5e9, 0.30e12, 512, 0.7, 64 << 10),
    80: Device(108, 1.4e9, 1.9e12, 1024, 0.8, 163 << 10),
    86: Device(82, 1.7e9, 0.90e12, 256, 0.8, 99 << 10),
    89: Device(128, 2.5e9, 1.0e12, 256, 0.8, 99 << 10),
    90: Device(132, 1.75e9, 4.3e12, 1024, 1.97, 227 << 10, group_products=2048),
    100: Device(148, 1.8e9, 7.0e12, 1024, 3.0, 227 << 10),
    120: Device(170, 2.4e9, 1.7e12, 256, 0.8, 99 << 10),
}
DEVICES["default"] = DEVICES[80]

# (direction, kernel, tile) -> instructions a weight, read from machine code, and wavefronts of shared memory for 32 weights.
COSTS = {
    ("forward", "skinny", 8): (4.6, 1.4), ("forward", "skinny", 16): (3.8, 1.3), ("forward", "skinny", 32): (3.1, 1.25),
    ("forward", "tiled", 16): (4.3, 1.3), ("forward", "tiled", 32): (4.9, 1.5), ("forward", "tiled", 64): (5.7, 2.1),
    ("forward", "tiled", 128): (8.6, 3.5),
    ("forward", "warpgroup", 64): (4.1, 2.4), ("forward", "warpgroup", 128): (3.6, 3.0), ("forward", "warpgroup", 256): (4.8, 4.8),
    ("backward", "tiled", 16): (4.7, 1.2), ("backward", "tiled", 32): (6.8, 1.3), ("backward", "tiled", 64): (12.1, 1.6),
    ("backward", "warpgroup", 64): (3.7, 1.9), ("backward", "warpgroup", 128): (4.5, 2.9), ("backward", "warpgroup", 256): (6.5, 5.0),
}  # fmt: skip
SCHEDULED_LANES = 128
REACHABLE = 0.85  # of any of these rates


def plans(direction: str, M: int, sums: int) -> Iterator[Plan]:
    """Every way to compute a product of M tokens whose sums have ``sums`` terms."""
    if direction == "forward" and M <= 64:
        yield from (Plan(KERNELS["skinny"], tile, 1) for tile in (8, 16, 32))
    for tile in (16, 32, 64, 128) if direction == "forward" else (16, 32, 64):
        if tile == 16 or tile < 2 * M:
            yield from (Plan(KERNELS["tiled"], tile, splits) for splits in splits_of(sums))
    for tile in (64, 128, 256) if M > 16 else ():
        if tile == 64 or tile < 2 * M:
            yield from (Plan(KERNELS["warpgroup"], tile, splits) for splits in splits_of(sums))


def splits_of(sums: int) -> list[int]:
    return [splits for splits in SPLITS if splits == 1 or sums >= splits * MOST_SPLIT_COLUMNS]


# ------------------------------------------------------------------------------------------------------------------------- the model


def _dense_seconds(device: Device, M: int, N: int, K: int) -> float:
    weights = N * K
    product = M * weights / (device.tensor_products * device.dense_share * device.multiprocessors * device.hertz)
    return 2 * device.launch + 2.5625 * weights / device.bytes_per_second + max(2 * weights / device.bytes_per_second, product) / REACHABLE


def _fused_seconds(device: Device, direction: str, M: int, N: int, K: int, plan: Plan) -> float:
    name = next(name for name, number in KERNELS.items() if number == plan.kernel)
    instructions, wavefronts = COSTS[direction, name, plan.tile]
    width = N if direction == "forward" else K
    if name == "skinny":
        tokens, covered = (8, plan.tile) if M <= 8 else (16, min(plan.tile, 16))
        resident = max(1, min(2, device.shared_memory // (65 << 10)))
    else:
        tokens, resident = plan.tile, 1
        covered = {"tiled": 256, "warpgroup": min(256, 32768 // tokens)}[name]
        if direction == "backward":
            covered = {"tiled": 4096, "warpgroup": 32768}[name] // tokens
    passes = ceil(M / tokens)
    count = ceil(width / covered) * passes * plan.splits
    slots = device.multiprocessors * resident
    busy = min(1.0, count / slots) if count < slots else count / slots / ceil(count / slots)
    weights = N * K * passes
    products = {"skinny": device.tensor_products / 2, "tiled": device.tensor_products, "warpgroup": device.group_products}[name]
    cycles = weights / 32 * max(instructions * 32 / SCHEDULED_LANES, wavefronts, 32 * tokens / products)
    compute = cycles / (device.multiprocessors * device.hertz * busy)
    memory = (0.5625 * N * K + 2 * M * (N + K)) / device.bytes_per_second / min(1.0, 1.5 * busy)
    cached = (0.5625 * weights + 2 * M * K * N / covered) / (2 * device.bytes_per_second)
    sums = device.launch + 8 * plan.splits * M * width / (2 * device.bytes_per_second) if plan.splits > 1 else 0.0
    return device.launch + 1e-6 + max(compute, memory, cached) / REACHABLE + sums


def _predict(capability, with_groups: bool = False) -> Callable:
    """Seconds of a product by the model; ``with_groups``: also by warp groups."""
    device = DEVICES[capability]

    def seconds(direction: str, M: int, N: int, K: int, plan) -> float:
        if plan is DENSE:
            return _dense_seconds(device, M, N, K)
        if plan.kernel == KERNELS["warpgroup"] and not (with_groups and device.group_products):
            return float("inf")
        too_old = capability == 75 and plan.kernel != KERNELS["skinny"]
        too_large = plan.tile == 128 and device.shared_memory < 208 << 10
        return float("inf") if too_old or too_large else _fused_seconds(device, direction, M, N, K, plan)

    return seconds


# ----------------------------------------------------------------------------------------------------------------------- measurement


def _measure() -> Callable:
    """Seconds of a product on the GPU, from replays of a graph of launches over rotating weights."""
    from bitsandbytes.backends.cuda import gemm

    has_groups = torch.cuda.get_device_capability() == (9, 0)

    @functools.lru_cache(maxsize=1)
    def weights_of(N: int, K: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = max(2, min(64, 4 * cache // (N * K // 2) + 1))
        packed = (torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, device="cuda") for _ in range(copies))
        return [(part, torch.rand(N * K // BLOCKSIZE, device="cuda")) for part in packed]

    def seconds(direction: str, M: int, N: int, K: int, plan) -> float:
        if plan is not DENSE and plan.kernel == KERNELS["warpgroup"] and not has_groups:
            return float("inf")
        A = torch.randn(M, K if direction == "forward" else N, device="cuda", dtype=torch.bfloat16)
        operator, planner = (gemm.gemm_4bit, "forward_plan") if direction == "forward" else (gemm.gemm_4bit_backward, "backward_plan")
        usual = getattr(gemm, planner)
        calls = [functools.partial(operator, A, packed, (N, K), absmax, BLOCKSIZE, "nf4") for packed, absmax in weights_of(N, K)]
        try:
            setattr(gemm, planner, lambda *shape: DENSE)
            expected = calls[0]()
            setattr(gemm, planner, lambda *shape: plan)
            if not is_right(calls[0](), expected):
                print(f"WRONG, and left out: {direction} {plan} for {M} tokens of {N} x {K}", flush=True)
                return float("inf")
            return _graph_seconds(calls)
        finally:
            setattr(gemm, planner, usual)

    return functools.lru_cache(maxsize=None)(seconds)


def is_right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results of 16 bits differ by no more than the order of sums and rounding explain."""
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= 0.01 * expected.norm())  # False for NaN


def _graph_seconds(calls: list[Callable], replays: int = 7) -> float:
    """The median over replays of a graph of all calls, for one call."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------------------------------- the table


def best_plans(seconds: Callable, direction: str, N: int, K: int) -> list[tuple]:
    """Entries (most tokens, kernel, tile, splits) of a shape, up to where a dense product is better for good."""
    names = {number: name for name, number in KERNELS.items()}
    chosen = []
    for M in TOKENS:
        ways = [DENSE, *plans(direction, M, K if direction == "forward" else N)]
        best = min(ways, key=lambda plan: seconds(direction, M, N, K, plan))
        if best is DENSE and M > FUSED_TOKENS[direction]:
            break
        best = best or min(ways[1:], key=lambda plan: seconds(direction, M, N, K, plan))
        chosen.append((M, names[best.kernel], best.tile, best.splits))
    return [entry for entry, following in zip(chosen, [*chosen[1:], None]) if following is None or entry[1:] != following[1:]]


def table(seconds: Callable, origin: str, has_backward: bool = True) -> dict:
    directions = {"forward": True, "backward": has_backward}
    shapes = {direction: {s: best_plans(seconds, direction, *s) for s in SHAPES} if wanted else {} for direction, wanted in directions.items()}
    return {"origin": origin, "simple_tokens": SIMPLE_TOKENS, "partial_bytes": PARTIAL_BYTES, "slab_bytes": SLAB_BYTES, **shapes}


HEADER = '''"""Which kernel computes which 4-bit product, by compute capability. Written by benchmarking/tune_gemm_4bit.py; read by gemm_4bit_plan.

``origin`` says where the figures come from: "predicted" ones are a model's, from data sheets and counted instructions, and were measured by nobody.
Shapes are (out features, in features), their entries (most tokens, kernel, tile, splits); beyond the last the weight is dequantised first.
"""

# fmt: off
TABLES = '''


def write(tables: dict) -> None:
    TABLE.write_text(HEADER + pprint.pformat(tables, width=148, sort_dicts=False) + "\n# fmt: on\n")


def check(seconds: Callable, capability: int) -> None:
    for direction, planner in (("forward", forward_plan), ("backward", backward_plan)):
        for N, K in SHAPES:
            for M in TOKENS:
                times = {plan: seconds(direction, M, N, K, plan) for plan in [DENSE, *plans(direction, M, K if direction == "forward" else N)]}
                plan = planner(capability, True, M, N, K)
                chosen, best = times.get(plan) or seconds(direction, M, N, K, plan), min(times, key=times.get)
                print(f"{direction:8} {M:5} {N:6} {K:6}  {plan} {chosen * 1e6:8.1f} us, best {best} {times[best] * 1e6:8.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.predict:
        kept = {known: entry for known, entry in TABLES.items() if entry["origin"] != "predicted"}
        predicted = {known: table(_predict(known), "predicted", has_backward=known != 75) for known in DEVICES if known not in kept}
        write(dict(sorted({**kept, **predicted}.items(), key=lambda item: str(item[0]).zfill(3))))
        return
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    if args.check:
        check(_measure(), capability)
        return
    write({**TABLES, capability: table(_measure(), f"measured on {torch.cuda.get_device_name()}")})


if __name__ == "__main__":
    main()
