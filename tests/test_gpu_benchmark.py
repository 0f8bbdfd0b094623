"""The benchmark of GPU kernels runs, and writes what it says: rehearsed on the CPU with the emulated library, which also plays the published one."""

import json
import os
from pathlib import Path
import subprocess
import sys

from native_cuda import emulated_library  # noqa: F401  (a fixture: the library is built)

ROOT = Path(__file__).resolve().parent.parent


def rehearse(out, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BNB_TEST_DEVICE": ""}
    command = [sys.executable, str(ROOT / "benchmarking" / "gpu_benchmark.py"), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr  # every failed case says so there
    return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_case_runs_and_leaves_a_line(tmp_path, emulated_library):  # noqa: F811
    screen, lines = rehearse(tmp_path / "kernels.jsonl")
    assert lines[0]["machine"]["gpu"] == "rehearsal" and lines[0]["machine"]["rates"]["memory"] > 0
    cases = [line for line in lines if "case" in line]
    assert len({line["key"] for line in cases} | {"-"}) > 20 and {"quantize_4bit nf4", "dequantize_4bit nf4"} <= {line["case"] for line in cases}
    for line in cases:
        assert line["us"] > 0 and line["floor_us"] > 0 and line["p10_us"] <= line["p90_us"], line
        assert not [key for key, value in line.items() if key.endswith("_that_differ") and value != 0], line
    assert f"{len(cases)} cases in" in screen


def test_a_second_run_resumes(tmp_path, emulated_library):  # noqa: F811
    out = tmp_path / "kernels.jsonl"
    rehearse(out, "--only", "dequantize_blockwise", "--seconds", "0")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[-1]["cases_left"] > 0 and not any("case" in line for line in lines)
    first = rehearse(out, "--only", "dequantize_blockwise")[1]
    second = rehearse(out, "--only", "dequantize_blockwise", "--resume")[1]
    assert len(second) == len(first) + 2  # the machine's line and the last one
