"""Speed and memory on a CPU, side by side with the published library and with dense layers.

    python benchmarking/cpu_benchmark.py --published /path/to/venv/bin/python [--only REGEX] [--json FILE] [--plot FILE] [--save NAME]

One process for each library (`cpu_cases.py`, the same lines in all of them) gets the cases one at a time, in turns: a round times
the case in every process, the next round begins with another one. A figure is the median of the rounds, a speed-up the ratio of two
such medians. All processes have the same inputs and the same number of threads; only one computes at a time.

Traffic is what a case has to read and write at least once. It is given as GB/s and as a share of the speed at which this machine
copies a large tensor; a 4-bit weight that fits the cache can exceed that, and a case that computes for long stays below it.

An fp32 layer computes in fp32 here; the published library computes it in bf16 (relative error 3e-3 instead of 2e-7), which is why it
is compared with the dense fp32 layer first.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
import json
import os
from pathlib import Path
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import cpu_cases
import torch

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE.parent / "examples" / "output" / "smollm2-fp32"
OURS, AVX2, PUBLISHED = "ours", "ours, avx2", "published"
MEMORY_LIMIT = 0.05
IMPORT_LIMIT = 0.3
QUIET = 0.03  # share of the CPUs that other programs may use


@dataclass(frozen=True)
class Target:
    """The time of a case divided by the time of a baseline is to be at most `limit`.

    `baseline` is "published" (the same case there) or the name of a case that is PyTorch alone.
    """

    baseline: str
    limit: float

    def __str__(self) -> str:
        name = "published" if self.baseline == PUBLISHED else "dense" if self.baseline.startswith("nn.") else "torch"
        return f"{1 / self.limit:.3g}x {name}" if self.limit <= 1 else f"{self.limit:.3g} of {name} time"


def faster(baseline: str, times: float) -> Target:
    return Target(baseline, 1 / times)


TARGETS: dict[str, list[Target]] = {
    **{f"quantize_4bit {dtype}": [faster(PUBLISHED, 40)] for dtype in ("fp32", "bf16")},
    **{f"dequantize_4bit {dtype}": [faster(PUBLISHED, 5)] for dtype in ("fp32", "bf16")},
    **{f"quantize_blockwise {dtype}": [faster(PUBLISHED, 8)] for dtype in ("fp32", "bf16")},
    "dequantize_blockwise fp32": [faster(PUBLISHED, 4)],
    **{f"Linear4bit bf16 M={rows}": [faster(PUBLISHED, 1)] for rows in (1, 4)},
    "Linear4bit bf16 M=16": [faster(PUBLISHED, 1.3)],
    "Linear4bit bf16 M=128": [Target("nn.Linear bf16 M=128", 1.3)],
    "Linear4bit bf16 M=512": [Target("nn.Linear bf16 M=512", 1.15)],
    **{f"Linear4bit fp32 M={rows}": [faster(f"nn.Linear fp32 M={rows}", 1), Target(PUBLISHED, 1.5)] for rows in (1, 4)},
    **{f"Linear4bit fp32 M={rows}": [faster(f"nn.Linear fp32 M={rows}", 1)] for rows in (16, 64, 128, 512)},
    **{f"training {dtype} M=64": [faster(PUBLISHED, 5)] for dtype in ("bf16", "fp32")},
    "Linear8bitLt bf16 M=1": [faster(PUBLISHED, 1)],
    "Linear8bitLt bf16 M=16": [faster(PUBLISHED, 4)],
    "Linear8bitLt bf16 M=128": [faster(PUBLISHED, 2.5), faster("nn.Linear bf16 M=128", 1)],
    "training int8 bf16 M=128": [faster(PUBLISHED, 5)],
    "EmbeddingNF4 50000 x 576, 512 tokens": [faster(PUBLISHED, 3)],
    "EmbeddingNF4 50000 x 65, 512 tokens": [faster(PUBLISHED, 1)],
    **{f"{optimizer} step": [faster(PUBLISHED, 10)] for optimizer in ("Adam8bit", "Lion8bit")},
    "AdamW8bit step": [faster(PUBLISHED, 10), Target("torch AdamW step", 1.5)],
    "Adam step": [faster(PUBLISHED, 4), Target("torch AdamW step", 1.2)],
    "AdamW8bit step, 400 x 4096": [faster(PUBLISHED, 30)],
    "Linear4bit 64x64 bf16 M=1": [Target("nn.Linear 64x64 bf16 M=1", 2.5)],
    "SmolLM2 NF4 generate": [faster(PUBLISHED, 1.2)],
    "SmolLM2 int8 generate": [faster(PUBLISHED, 8)],
}
# Cases that are also run with BNB_CPU_ISA=avx2.
AVX2_TARGETS = {"Linear4bit fp32 M=1": [faster("nn.Linear fp32 M=1", 2.5)]}


class Worker:
    """A process that measures with one library."""

    def __init__(self, name: str, python: str, environment: dict[str, str]):
        self.name, self.python, self.environment = name, python, environment
        self.process = self._start()
        self.identity = self._answer()

    def _start(self) -> subprocess.Popen:
        # Started in an empty folder, so that a source tree in the current one cannot be imported by accident.
        command = [self.python, str(HERE / "cpu_cases.py")]
        return subprocess.Popen(command, env=self.environment, cwd=tempfile.gettempdir(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SystemExit(f"The benchmark process of {self.name} ({self.python}) ended with status {status}; its message stands above.")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def fresh(self) -> Worker:
        """A new process like this one."""
        return Worker(self.name, self.python, self.environment)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def import_seconds(self) -> float:
        """What `import bitsandbytes` adds to `import torch`: the best of seven fresh interpreters."""
        command = [self.python, "-X", "importtime", "-c", "import torch, bitsandbytes"]
        times = []
        for _ in range(7):
            run = subprocess.run(command, env=self.environment, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True)
            [row] = [line for line in run.stderr.splitlines() if re.fullmatch(r"import time: .*\| bitsandbytes", line)]
            times.append(int(row.split("|")[1]) / 1e6)
        return min(times)


def start_workers(arguments) -> dict[str, Worker]:
    """One worker a library, and one for this library held to AVX2."""
    environment = dict(os.environ, BENCHMARK_THREADS=str(arguments.threads), TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    workers = {
        OURS: Worker(OURS, sys.executable, environment),
        AVX2: Worker(AVX2, sys.executable, dict(environment, BNB_CPU_ISA="avx2")),
    }
    if arguments.published:
        foreign = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        workers[PUBLISHED] = Worker(PUBLISHED, arguments.published, foreign)
        if workers[PUBLISHED].identity["file"] == workers[OURS].identity["file"]:
            raise SystemExit(f"--published {arguments.published} imports the same bitsandbytes as this interpreter.")
    return workers


def time_case(name: str, case: cpu_cases.Case, workers: dict[str, Worker], arguments) -> dict[str, float]:
    """Seconds of one call for each worker: the median over rounds, each round beginning with the next worker."""
    taking_part = [
        worker for worker in workers.values()
        if worker.name == OURS or (worker.name == PUBLISHED and case.published) or (worker.name == AVX2 and name in AVX2_TARGETS)
    ]  # fmt: skip
    rounds: dict[str, list[float]] = {worker.name: [] for worker in taking_part}
    for index in range(arguments.rounds):
        first = index % len(taking_part)
        for worker in taking_part[first:] + taking_part[:first]:
            rounds[worker.name].append(worker.ask(run=name, seconds=arguments.seconds)["seconds"])
    for worker in taking_part:
        worker.ask(forget=name)
    return {worker: statistics.median(times) for worker, times in rounds.items()}


def judge(times: dict[str, dict[str, float]], name: str, seconds: float, targets: list[Target]) -> list[dict]:
    """Compare a time with each of its targets whose baseline was measured."""
    verdicts = []
    for target in targets:
        baseline = times[name].get(PUBLISHED) if target.baseline == PUBLISHED else times.get(target.baseline, {}).get(OURS)
        if baseline is not None:
            verdicts.append({"target": str(target), "limit": target.limit, "ratio": seconds / baseline, "pass": seconds <= target.limit * baseline})
    return verdicts


def build_rows(times: dict[str, dict[str, float]], cases: dict[str, cpu_cases.Case], bandwidth: float) -> list[dict]:
    """One row a case and library variant, ready to print."""
    rows = []
    for name, by_worker in times.items():
        for variant, targets in ((OURS, TARGETS), (AVX2, AVX2_TARGETS)):
            if variant not in by_worker:
                continue
            seconds, published = by_worker[variant], by_worker.get(PUBLISHED) if variant == OURS else None
            rows.append({
                "case": name if variant == OURS else f"{name}, avx2",
                "seconds": seconds,
                "published_seconds": published,
                "speedup": published / seconds if published else None,
                "traffic_bytes": cases[name].traffic,
                "bandwidth_share": cases[name].traffic / seconds / bandwidth,
                "verdicts": judge(times, name, seconds, targets.get(name, [])),
            })  # fmt: skip
    return rows


def measure_processes(workers: dict[str, Worker]) -> list[dict]:
    """Figures of whole processes: extra memory of quantize_4bit, import time."""
    rows = []
    for title, limit, unit, figure in (
        ("quantize_4bit fp32, extra memory", MEMORY_LIMIT, "of the input", extra_memory),
        ("import bitsandbytes beyond torch", IMPORT_LIMIT, "s", Worker.import_seconds),
    ):
        values = {name: figure(workers[name]) for name in (OURS, PUBLISHED) if name in workers}
        ours = values[OURS]
        rows.append({"case": title, "unit": unit, "value": ours, "published": values.get(PUBLISHED), "limit": limit, "pass": ours < limit})
    return rows


def extra_memory(worker: Worker) -> float:
    fresh = worker.fresh()
    extra = fresh.ask(memory=True)["extra"]
    fresh.close()
    return extra


class OtherLoad:
    """How busy other programs keep the CPUs: times of threads that wait for each other mean little on a machine that is not quiet."""

    def __init__(self):
        self.wall, self.others = time.perf_counter(), self._others_seconds()

    @staticmethod
    def _others_seconds() -> float:
        """CPU seconds of everything but this process and its ended children, up to a constant; 0 where /proc/stat does not exist."""
        try:
            user, nice, system, _idle, _disk, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        except OSError:
            return 0.0
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own

    def share(self) -> float:
        """Share of all CPUs that others used since the start. To be asked when all workers have ended."""
        return max(0.0, (self._others_seconds() - self.others) / (time.perf_counter() - self.wall) / os.cpu_count())


# --- output ------------------------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def table(rows: list[dict], process_rows: list[dict]) -> str:
    """A Markdown table that also reads well in a terminal."""
    head = ["case", "time", "published", "speed-up", "GB/s", "of copy", "measured / target", ""]
    body = []
    for row in rows:
        verdicts = row["verdicts"]
        body.append([
            row["case"],
            duration(row["seconds"]),
            duration(row["published_seconds"]),
            f"{row['speedup']:.2f}x" if row["speedup"] else "",
            f"{row['traffic_bytes'] / row['seconds'] / 1e9:.1f}",
            f"{row['bandwidth_share']:.0%}",
            "; ".join(f"{1 / v['ratio']:.2f}x / {v['target']}" if v["limit"] <= 1 else f"{v['ratio']:.2f} / {v['target']}" for v in verdicts),
            verdict_word(verdicts),
        ])  # fmt: skip
    for row in process_rows:
        published = "" if row["published"] is None else f"{row['published']:.3f}"
        target = f"{row['value']:.3f} / under {row['limit']} {row['unit']}"
        body.append([row["case"], f"{row['value']:.3f}", published, "", "", "", target, verdict_word([row])])
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)) + " |" for line in [head, *body]]
    lines.insert(1, "|" + "|".join("-" * (size + 2) for size in widths) + "|")
    return "\n".join(lines)


def verdict_word(verdicts: list[dict]) -> str:
    if not verdicts:
        return ""
    return "pass" if all(verdict["pass"] for verdict in verdicts) else "FAIL"


def processor() -> str:
    """Name and number of the CPUs, with the vector instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"model name\s*: (.*)", text)
    flags = set(text.split())
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "AVX512-BF16"}
    known = [name for flag, name in names.items() if flag in flags]
    return f"{os.cpu_count()} x {model.group(1).strip() if model else platform.machine()} ({', '.join(known)})"


def draw(rows: list[dict], path: Path) -> None:
    """Speed-up over the published library, a bar a case, targets as marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["speedup"]][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(rows)))
    axes.barh([row["case"] for row in rows], [row["speedup"] for row in rows], color="steelblue")
    for position, row in enumerate(rows):
        axes.text(row["speedup"], position, f" {row['speedup']:.{0 if row['speedup'] >= 10 else 1}f}x", va="center", fontsize=8)
        for target in TARGETS.get(row["case"], []):
            if target.baseline == PUBLISHED:
                axes.plot([1 / target.limit] * 2, [position - 0.4, position + 0.4], color="darkorange", linewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast as the published library (orange: target)")
    axes.set_xlim(right=2 * max(row["speedup"] for row in rows))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", metavar="PYTHON", help="an interpreter with the published bitsandbytes (and the same torch)")
    parser.add_argument("--only", default="", metavar="REGEX", help="run the cases whose name matches; dense baselines are added")
    parser.add_argument("--rounds", type=int, default=5, help="rounds a case (default 5)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on a case a round and library (default 0.3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: what torch chooses)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups as a PNG (needs matplotlib and --published)")
    parser.add_argument("--save", metavar="NAME", help="write benchmarking/results/NAME.md and .json")
    arguments = parser.parse_args()

    if MODEL_FOLDER.exists():
        os.environ["BENCHMARK_MODEL"] = str(MODEL_FOLDER)
    else:
        print("No SmolLM2 checkpoint: run examples/quickstart.py once to measure generation as well.", file=sys.stderr)
    other_load = OtherLoad()
    workers = start_workers(arguments)
    cases = cpu_cases.all_cases()
    chosen = [name for name in cases if re.search(arguments.only, name)]
    baselines = {target.baseline for table in (TARGETS, AVX2_TARGETS) for name in chosen for target in table.get(name, [])}
    names = [name for name in cases if name in chosen or name in baselines]

    bandwidth = workers[OURS].ask(bandwidth=True)["bytes_per_second"]
    times = {}
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        times[name] = time_case(name, cases[name], workers, arguments)
    process_rows = [] if arguments.only else measure_processes(workers)
    for worker in workers.values():
        worker.close()
    disturbance = other_load.share()

    rows = build_rows(times, cases, bandwidth)
    libraries = {name: {key: worker.identity[key] for key in ("bitsandbytes", "torch", "threads")} for name, worker in workers.items()}
    heading = [f"{processor()}; copy {bandwidth / 1e9:.1f} GB/s; {arguments.rounds} rounds; other programs used {disturbance:.0%} of the CPUs"]
    heading += ["{}: bitsandbytes {}, torch {}, {} threads".format(name, *library.values()) for name, library in libraries.items()]
    report = "\n".join(heading) + "\n\n" + table(rows, process_rows)
    print(report)
    if disturbance > QUIET:
        print("\nThe machine was not quiet: these times say little. Measure again when nothing else runs.", file=sys.stderr)
    everything = {
        "machine": processor(),
        "copy_bytes_per_second": bandwidth,
        "other_load": disturbance,
        "libraries": libraries,
        "cases": rows,
        "processes": process_rows,
    }
    record = json.dumps(everything, indent=1)
    if arguments.save:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{arguments.save}.md").write_text(f"# CPU benchmark: {arguments.save}\n\n{report}\n")
        (folder / f"{arguments.save}.json").write_text(record + "\n")
    if arguments.json:
        arguments.json.write_text(record + "\n")
    if arguments.plot and arguments.published:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
