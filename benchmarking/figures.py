"""The figures of the documentation, and the numbers behind them.

    python benchmarking/figures.py                        writes benchmarking/results/quantisation-error.json and docs/source/images/*.svg
    python benchmarking/figures.py RUN.json               writes RUN.png: how many times faster than the published wheel each case was

The figure of speeds in the documentation is drawn from a recorded run of ``cpu_benchmark.py`` as well.

The error of a format is the root mean square of (dequantised - x) over that of x, for values x that are spread like a normal distribution:
its quantiles in a fixed order, so that every machine has the same.
"""

from __future__ import annotations

import json
from pathlib import Path
import re
import sys

import torch

from bitsandbytes import codebooks
import bitsandbytes.functional as F

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "quantisation-error.json"
SPEEDS = HERE / "results" / "cpu-zen5-2-cores.json"
IMAGES = HERE.parent / "docs" / "source" / "images"

COUNT = 1 << 18
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SERIES = {
    "NF4": {"quant_type": "nf4"},
    "NF4, double quantisation": {"quant_type": "nf4", "compress_statistics": True},
    "FP4": {"quant_type": "fp4"},
}
COLOURS = {"NF4": "#0b5cad", "NF4, double quantisation": "#5aa3e8", "FP4": "#c2571a", "int8": "#2a8f5b", "dense": "#59636e"}


def normal_values() -> torch.Tensor:
    """float32 [COUNT]: the quantiles of a standard normal distribution, shuffled by a fixed permutation."""
    place = torch.arange(COUNT)
    for factor in (104729, 92821, 69069):  # odd factors, and a number combined with its own upper half, permute the numbers below a power of two
        place = (place ^ place >> 9) * factor % COUNT
    return torch.special.ndtri((place.double() + 0.5) / COUNT).float()


def relative_error(values: torch.Tensor, **options) -> float:
    packed, state = F.quantize_4bit(values, **options)
    difference = F.dequantize_4bit(packed, state).double() - values.double()
    return (difference.pow(2).mean() / values.double().pow(2).mean()).sqrt().item()


def quantisation_errors() -> dict[str, list[float]]:
    """The error of each series at each block size."""
    values = normal_values()
    return {name: [relative_error(values, blocksize=size, **options) for size in BLOCKSIZES] for name, options in SERIES.items()}


def bits_per_weight(blocksize: int, nested: bool) -> float:
    """4 for the code, and its share of the statistics: float32, or a byte and a float32 for each 256 of them."""
    return 4 + (8 + 32 / 256 if nested else 32) / blocksize


def recorded() -> dict[str, list[float]]:
    return json.loads(RESULTS.read_text())["relative_error"]


# -------------------------------------------------------------------------------------------------------------------------- drawing


def new_figure(width: float, height: float, **options):
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bitsandbytes", "font.family": "sans-serif", "font.size": 10})
    return Figure(figsize=(width, height), layout="constrained").subplots(**options)


def save(axes, name: str) -> None:
    axes.figure.savefig(IMAGES / name, metadata={"Date": None, "Creator": None})
    lines = [line.rstrip() for line in (IMAGES / name).read_text().splitlines()]
    (IMAGES / name).write_text("\n".join(lines) + "\n")


def draw_levels() -> None:
    """The 16 levels of each type on a line, and where one ends and the next begins."""
    axes = new_figure(8, 1.9)
    fp4 = codebooks.fp4_thresholds()
    thresholds = {"NF4": codebooks.nf4_thresholds(), "FP4": torch.cat([-fp4, fp4])}
    for height, name in ((1, "NF4"), (0, "FP4")):
        levels = codebooks.levels(name.lower())
        axes.hlines(height, -1, 1, color="#c8ced5", linewidth=1, zorder=1)
        axes.vlines(thresholds[name], height - 0.13, height + 0.13, color="#9aa4ae", linewidth=0.8, zorder=2)
        axes.scatter(levels, torch.full_like(levels, height), s=34, color=COLOURS[name], zorder=3)
    axes.set(yticks=[1, 0], yticklabels=["NF4", "FP4"], ylim=(-0.5, 1.5), xlim=(-1.06, 1.06), xlabel="value, as a multiple of the block's absmax")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    save(axes, "levels.svg")


def draw_errors(errors: dict[str, list[float]]) -> None:
    """Error against memory, a point a block size."""
    axes = new_figure(8, 4)
    for name, values in errors.items():
        bits = [bits_per_weight(size, "compress_statistics" in SERIES[name]) for size in BLOCKSIZES]
        axes.plot(bits, [100 * value for value in values], "o-", color=COLOURS[name], label=name, markersize=5)
        if "compress_statistics" not in SERIES[name]:
            for size, x, y in zip(BLOCKSIZES[:4], bits, values):  # the others lie too close together
                axes.annotate(str(size), (x, 100 * y), textcoords="offset points", xytext=(5, 5), fontsize=8, color="#59636e")
    axes.set(xlabel="bits per weight, statistics included", ylabel="relative error, %", ylim=(0, None))
    axes.grid(color="#e4e8ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    save(axes, "quantisation_error.svg")


def draw_speeds(cases: list[dict]) -> None:
    """Time of a bfloat16 layer against the number of tokens: here, in the published library, and dense."""
    axes = new_figure(8, 4)
    for layer, name in (("nn.Linear", "dense"), ("Linear8bitLt", "int8"), ("Linear4bit", "NF4")):
        rows = [(int(case["case"].partition("M=")[2]), case) for case in cases if re.fullmatch(rf"{re.escape(layer)} bf16 M=\d+", case["case"])]
        for key, style, where in (("seconds", "o-", "" if name == "dense" else ", here"), ("published_seconds", "o:", ", published")):
            points = [(tokens, 1000 * case[key]) for tokens, case in sorted(rows, key=lambda row: row[0]) if case.get(key)]
            if points:
                axes.plot(*zip(*points), style, color=COLOURS[name], label=name + where, markersize=4)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", xticks=[1, 4, 16, 128, 512], xticklabels=["1", "4", "16", "128", "512"]
    )
    axes.set(yticks=[0.1, 1, 10], yticklabels=["0.1", "1", "10"])
    axes.minorticks_off()
    axes.grid(color="#e4e8ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(axes, "cpu_speed.svg")


def draw_speedups(run: Path) -> Path:
    """Every case of a run that the published wheel has too, as a bar from 1: to the right where this library is faster."""
    cases = [case for case in json.loads(run.read_text())["cases"] if case.get("speedup")]
    axes = new_figure(8, 0.8 + 0.2 * len(cases))
    speedups = [case["speedup"] for case in cases]
    bars = axes.barh([case["case"] for case in cases], [speedup - 1 for speedup in speedups], left=1, height=0.7)
    for bar, speedup in zip(bars, speedups):
        bar.set_color(COLOURS["NF4"] if speedup >= 1 else COLOURS["FP4"])
        axes.annotate(f"{speedup:.2g}" if speedup < 10 else f"{speedup:.0f}", (max(speedup, 1), bar.get_y() + 0.35), (4, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="times as fast as the published wheel", xticks=[0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.set(xticklabels=["0.5", "1", "2", "5", "10", "20", "50", "100"], xlim=(0.5, 2 * max(speedups)), ylim=(len(cases) - 0.4, -0.6))
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e4e8ec")
    axes.set_axisbelow(True)
    target = run.with_suffix(".png")
    axes.figure.savefig(target, dpi=110, metadata={"Software": None})
    return target


def main() -> None:
    if len(sys.argv) > 1:
        print(draw_speedups(Path(sys.argv[1])))
        return
    errors = quantisation_errors()
    record = {
        "what": "root mean square error over that of the values, normal distribution",
        "values": COUNT,
        "blocksizes": BLOCKSIZES,
        "relative_error": {name: [round(value, 6) for value in values] for name, values in errors.items()},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_levels()
    draw_errors(errors)
    draw_speeds(json.loads(SPEEDS.read_text())["cases"])


if __name__ == "__main__":
    main()
