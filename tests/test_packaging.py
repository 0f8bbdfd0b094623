"""What an installation promises: one version, its papers, and an import that is quick, silent and offline."""

import importlib.metadata
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

import bitsandbytes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(bitsandbytes.__file__).resolve().parent


def run_python(code: str, *options: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that imports the same package."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, *options, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_version_is_defined_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", bitsandbytes.__version__)
    places = [path for path in (ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *PACKAGE.rglob("*.py"))
              if bitsandbytes.__version__ in path.read_text()]  # fmt: skip
    assert places == [PACKAGE / "__init__.py"]
    assert 'version = { attr = "bitsandbytes.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_installed_metadata_agrees_with_the_source():
    try:
        installed = importlib.metadata.distribution("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a source tree that is not installed")
    assert installed.version == bitsandbytes.__version__
    assert {"LICENSE", "NOTICE"} <= {Path(str(file)).name for file in installed.files}
    assert not [line for line in installed.requires if line.startswith("bitsandbytes") and "extra" not in line]


def test_papers_are_in_order():
    assert (PACKAGE / "py.typed").exists()
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    notice = (ROOT / "NOTICE").read_text()
    for credit in ("independent implementation", "bitsandbytes-foundation/bitsandbytes", "2110.02861", "2208.07339", "2305.14314"):
        assert credit in notice


def test_constraints_pin_every_direct_requirement():
    pinned = {re.split(r"[=<>~! ;\[]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()}
    project = (ROOT / "pyproject.toml").read_text()
    for table in ("dependencies", "test", "quickstart", "lint", "wheel"):
        listed = re.search(rf"^{table} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL).group(1)
        names = {re.split(r"[=<>~!\[]", name)[0].lower() for name in re.findall(r'"([^"]+)"', listed)}
        assert names and names <= pinned, f"{table}: {sorted(names - pinned)} have no tested version"


def test_import_takes_little_time_beyond_torch():
    """One run of several under the limit is enough: other programs on the machine only ever add to the time."""
    seconds = []
    while len(seconds) < 5 and not (seconds and min(seconds) < 0.3):
        done = run_python("import torch, bitsandbytes", "-X", "importtime")
        assert done.returncode == 0, done.stderr
        [row] = [line for line in done.stderr.splitlines() if re.fullmatch(r"import time: .*\| bitsandbytes", line)]
        seconds.append(int(row.split("|")[1]) / 1e6)
    assert min(seconds) < 0.3


def test_import_is_silent_and_offline():
    code = """
import json, logging, sys, warnings
import torch
messages, sockets = [], []

class Collect(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())

logging.getLogger().addHandler(Collect())
logging.getLogger().setLevel(logging.DEBUG)
warnings.simplefilter("always")
warnings.showwarning = lambda message, *rest: messages.append(str(message))
sys.addaudithook(lambda event, arguments: sockets.append(event) if event.startswith("socket.") else None)
import bitsandbytes
print(json.dumps([messages, sockets, torch.cuda.is_initialized()]))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [], False]
    assert done.stderr == ""


def test_import_loads_no_heavy_package():
    """Only torch and what torch itself brings: programs that do not use them should not pay for these."""
    done = run_python("import sys, torch; before = set(sys.modules); import bitsandbytes; print(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"transformers", "accelerate", "peft", "scipy", "pandas", "matplotlib", "triton", "kernels", "requests"})


def test_reload_keeps_the_operators():
    """Reloading must neither fail on operators that are registered already nor break them."""
    code = """
import importlib, torch, bitsandbytes
importlib.reload(bitsandbytes)
importlib.reload(bitsandbytes.functional)
x = torch.randn(64, 64)
packed, state = bitsandbytes.functional.quantize_4bit(x)
assert (bitsandbytes.functional.dequantize_4bit(packed, state) - x).abs().mean() < 0.15
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------------- the native library
OLDEST_GLIBC = (2, 27)  # what the tag of a wheel promises; Linux distributions of 2018 have it
LIBRARIES = sorted(PACKAGE.glob("libbitsandbytes_cpu.so"))


@pytest.mark.skipif(not LIBRARIES, reason="no native library for Linux is built here")
def test_native_library_asks_for_no_newer_system_than_wheels_promise():
    versions = {tuple(map(int, version.split(b"."))) for version in re.findall(rb"\0GLIBC_([0-9.]+)(?=\0)", LIBRARIES[0].read_bytes())}
    assert versions and max(versions) <= OLDEST_GLIBC


@pytest.mark.skipif(not LIBRARIES, reason="no native library for Linux is built here")
def test_native_library_exports_its_c_interface_and_nothing_else():
    listed = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARIES[0])], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    assert "bnb_cpu_gemm_4bit" in names
    strangers = {name for name in names if not re.match(r"bnb_|c?dequantize_|cquantize_|gemv_|has_avx512", name)}
    assert strangers == set()


def test_driver_of_the_native_library_knows_every_function():
    """One that is declared and not checked without Python would go unnoticed on emulated processors and by the sanitisers."""
    declared = set(re.findall(r"BNB_API [^;(]*?\bbnb_(\w+)\(", (ROOT / "csrc" / "api" / "api.h").read_text()))
    known = set(re.findall(r"^    X\((\w+)\)", (ROOT / "tests" / "native" / "support.h").read_text(), re.MULTILINE))
    assert declared and declared == known
