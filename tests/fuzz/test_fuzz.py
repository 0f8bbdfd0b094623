"""Each fuzzing target on a few inputs, the same every time, and that the runner sees what goes wrong. `make fuzz` goes on from here."""

from pathlib import Path
import subprocess
import sys

from hypothesis import HealthCheck, settings
import pytest
from targets import TARGETS

few = settings(max_examples=15, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TARGETS)
def test_target(name):
    few(TARGETS[name])()


@pytest.mark.parametrize("failure, seen", [("assert False, 'wrong'", "AssertionError: wrong"), ("import os; os.abort()", "ended by signal 6")])
def test_runner_reports_failures_and_crashes(tmp_path, failure, seen):
    here = Path(__file__).resolve().parent
    (tmp_path / "run.py").write_bytes((here / "run.py").read_bytes())
    bad = "from hypothesis import given, strategies as st\n\n@given(st.none())\ndef bad(x):\n"
    (tmp_path / "targets.py").write_text(f"{bad}    {failure}\n\nTARGETS = {{'bad': bad}}\n")
    done = subprocess.run([sys.executable, str(tmp_path / "run.py"), "--rounds", "1", "--seed", "5"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and seen in done.stdout
    assert "run.py --target bad --seed 5 --rounds 1" in done.stdout and done.stdout.endswith("1 failures\n")
