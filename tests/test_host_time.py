"""The script that measures the host's time for a call of a layer, where it replaces the kernels."""

from pathlib import Path
import shutil
import subprocess
import sys

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarking" / "host_time.py"


@pytest.mark.skipif(not SCRIPT.exists() or shutil.which("cc") is None, reason="takes the benchmarks beside these tests, and a C compiler")
def test_every_layer_is_timed():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert {(tokens, name) for tokens, name, *_ in rows} >= {(tokens, name) for tokens in ("1", "16") for name in ("plain", "nested")}
    for _, _, inference, training, backward in rows:
        assert 0 < float(inference) and 0 < float(training) and 0 < float(backward)
