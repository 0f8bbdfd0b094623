"""Times the GPU kernels, beside those of the published library, and writes one line of JSON for each.

    python benchmarking/gpu_benchmark.py [--published /path/to/libbitsandbytes_cuda130.so] [--only quantize] [--seconds 400] [--resume]

Both libraries are loaded into one process and called through their C functions, so that nothing but the kernels differs. Every case rotates over
enough operands to overflow the second-level cache four times. 20 calls or more are captured in a CUDA graph, which is replayed 15 times; what cannot
be captured (published functions that use the default stream) is timed in a loop, and then so is ours. A line holds the median and the tenth and
ninetieth percentile in microseconds, what the time would be at the rate of memory or arithmetic measured first, and what was predicted before
anybody measured.

The cases are in gpu_cases_*.py beside this file. ``--rehearse`` runs them all on the CPU with the emulated library, in small: a test of the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import ctypes as ct
from dataclasses import dataclass, field
import importlib
import json
from pathlib import Path
import re
import statistics
import subprocess
import sys
import time

import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("quantize", "gemm", "optimizers", "int8")  # gpu_cases_<family>.py
LAUNCHES, REPLAYS = 20, 15
CACHE_BYTES = 240 << 20  # four times the second-level cache of an H200
MOST_COPIES = 200
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Call = Callable[[], object]


@dataclass
class Case:
    """One thing to time.

    Attributes:
        name: of the operator and what distinguishes the case: "quantize_4bit nf4".
        size: numbers and names for the record: {"n": 1 << 29, "dtype": "bf16"}.
        bytes: that must be read and written at least.
        build: makes operands anew and returns the call of ours and that of the published library (None: it has no such thing).
        operations: floating-point or integer operations of the product, and by which measured rate they are judged.
        rate: "bf16" or "int8".
        predicted: share of the floor that the kernel should reach.
        published_graph: whether the published function takes a stream, so that it can be captured.
        same: compares the results of the calls of one ``build``; what it returns is recorded.
    """

    name: str
    size: dict
    bytes: int
    build: Callable[[], tuple[Call, Call | None]]
    operations: float = 0.0
    rate: str = "bf16"
    predicted: float | None = None
    published_graph: bool = True
    same: Callable[[], dict] | None = None

    @property
    def key(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.size.items())])


@dataclass
class Machine:
    """A GPU and the libraries, for cases and the clock.

    Attributes:
        published: the published library, or None.
        shrink: sizes are divided by this: 1 on a GPU.
        rates: bytes or operations a second, by name.
    """

    published: ct.CDLL | None = None
    device: str = "cuda"
    shrink: int = 1
    rates: dict[str, float] = field(default_factory=dict)

    def stream(self) -> ct.c_void_p:
        """The current stream, for published functions that take one."""
        return ct.c_void_p(torch.cuda.current_stream().cuda_stream)

    def describe(self) -> dict:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__, "driver": nvidia_smi("driver_version"), "clocks_mhz": nvidia_smi("clocks.sm,clocks.mem"),
            "revision": revision(),
        }  # fmt: skip

    def measure_rates(self) -> None:
        """What this machine can do at best: bytes of a copy, operations of large products."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.rates["memory"] = 2 * source.numel() / statistics.median(self.time([lambda: target.copy_(source)], True))
        side = 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.rates["bf16"] = 2 * side**3 / statistics.median(self.time([lambda: torch.mm(a, b)], True))
        a, b = (torch.randint(-127, 128, (side, side), device=self.device, dtype=torch.int8) for _ in range(2))
        self.rates["int8"] = 2 * side**3 / statistics.median(self.time([lambda: torch._int_mm(a, b.t())], True))

    def time(self, calls: list[Call], graph: bool) -> list[float]:
        """Seconds of a call, several times; the calls take turns."""
        for call in calls:
            call()
        torch.cuda.synchronize()

        launches = max(LAUNCHES, len(calls))

        def run():
            for launch in range(launches):
                calls[launch % len(calls)]()

        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            run = captured.replay
        seconds = []
        for _ in range(REPLAYS + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000 / launches)
        return seconds[3:]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Rehearsal(Machine):
    """The emulated library in place of both libraries, and the CPU's clock."""

    def stream(self) -> ct.c_void_p:
        return ct.c_void_p(None)

    def describe(self) -> dict:
        return {"gpu": "rehearsal", "revision": revision()}

    def measure_rates(self) -> None:
        self.rates = {"memory": 1e10, "bf16": 1e10, "int8": 1e10}

    def time(self, calls: list[Call], graph: bool) -> list[float]:
        begin = time.perf_counter()
        calls[0]()
        return [time.perf_counter() - begin]

    def synchronize(self) -> None:
        pass


def nvidia_smi(query: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
        return done.stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "unknown"


def revision() -> str:
    try:
        return (
            subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, timeout=30).stdout.strip() or "unknown"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def all_cases(machine: Machine) -> Iterator[tuple[str, Case]]:
    for family in FAMILIES:
        if (Path(__file__).parent / f"gpu_cases_{family}.py").exists():
            for case in importlib.import_module(f"gpu_cases_{family}").cases(machine):
                yield family, case


def measure(machine: Machine, case: Case) -> dict:
    """Times a case and returns its record."""
    floor = max(case.bytes / machine.rates["memory"], case.operations / machine.rates[case.rate])
    copies = 1 if machine.shrink > 1 else max(1, min(MOST_COPIES, -(-CACHE_BYTES // case.bytes)))
    ours, published = zip(*(case.build() for _ in range(copies)))
    has_published = published[0] is not None
    graph = case.published_graph or not has_published
    record = {"case": case.name, **case.size, "bytes": case.bytes, "operations": case.operations, "how": "graph" if graph else "loop"}
    record |= {"floor_us": floor * 1e6, "predicted_us": None if case.predicted is None else floor / case.predicted * 1e6}
    seconds = machine.time(list(ours), graph)
    record |= summary(seconds, "")
    record |= {"gb_per_s": case.bytes / statistics.median(seconds) / 1e9, "of_floor": floor / statistics.median(seconds)}
    if has_published:
        seconds_published = machine.time(list(published), graph)
        record |= summary(seconds_published, "published_")
        record["times_published"] = statistics.median(seconds_published) / statistics.median(seconds)
    if case.same is not None and has_published:
        machine.synchronize()
        record |= case.same()
    return record


def summary(seconds: list[float], prefix: str) -> dict:
    tenths = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return {f"{prefix}us": statistics.median(seconds) * 1e6, f"{prefix}p10_us": tenths[0] * 1e6, f"{prefix}p90_us": tenths[8] * 1e6}


def table(records: list[dict]) -> str:
    """One screen: what was measured, beside the floor, the prediction and the published library."""
    lines = [f"{'case':72} {'us':>10} {'floor':>10} {'of floor':>8} {'predicted':>9} {'times published':>15}"]
    for record in records:
        named = [str(record["case"])] + [
            f"{k}={v}" for k, v in record.items() if k in ("n", "M", "N", "K", "dtype", "blocksize", "tensors", "nested")
        ]
        predicted = f"{record['floor_us'] / record['predicted_us']:.2f}" if record["predicted_us"] else ""
        ratio = f"{record['times_published']:.2f}" if "times_published" in record else ""
        lines.append(f"{' '.join(named):72.72} {record['us']:10.2f} {record['floor_us']:10.2f} {record['of_floor']:8.2f} {predicted:>9} {ratio:>15}")
    return "\n".join(lines)


def make_machine(arguments) -> Machine:
    if arguments.rehearse:
        from native_cuda import EmulatedLibrary, build_emulated_library

        from bitsandbytes.backends.cuda import native

        library = EmulatedLibrary(build_emulated_library())
        native.use_library(library, lambda tensor: EmulatedLibrary.where)
        return Rehearsal(published=library._lib, device="cpu", shrink=1 << 16)
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here that torch can use. --rehearse runs the program without one.")
    return Machine(published=None if arguments.published is None else ct.CDLL(str(arguments.published)))


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--published", type=Path, help="the published CUDA library, to be timed beside ours")
    parser.add_argument("--only", default="", help="cases whose family or name contains this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here; default: results/<name of the GPU>/kernels.jsonl")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the emulated library, in small")
    arguments = parser.parse_args(command_line)

    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    machine = make_machine(arguments)
    facts = machine.describe()
    out = arguments.out or Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") / "kernels.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {line["key"] for line in map(json.loads, out.read_text().splitlines()) if "key" in line} if arguments.resume and out.exists() else set()

    begin, records, left = time.monotonic(), [], 0
    with out.open("a") as file:

        def write(record: dict) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        machine.measure_rates()
        write({"machine": facts | {"rates": machine.rates, "published": arguments.published and arguments.published.name}})
        for family, case in all_cases(machine):
            if arguments.only not in f"{family} {case.name}" or case.key in known:
                continue
            if time.monotonic() - begin > arguments.seconds:
                left += 1
                continue
            try:
                records.append({"family": family, "key": case.key} | measure(machine, case))
            except (RuntimeError, torch.OutOfMemoryError) as error:  # one case that fails must not cost the rest
                write({"family": family, "failed": case.key, "error": str(error)})
                print(f"{case.key}: {error}", file=sys.stderr)
                continue
            write(records[-1])
        write({"clocks_after_mhz": nvidia_smi("clocks.sm,clocks.mem"), "cases_left": left})
    print(table(records))
    print(f"{len(records)} cases in {out}" + (f"; no time for {left}: run again with --resume" if left else ""))


if __name__ == "__main__":
    # Cases import this module by its name; it must be the one that runs.
    sys.modules.setdefault("gpu_benchmark", sys.modules[__name__])
    main()
