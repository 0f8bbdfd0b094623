"""The runner of the published tests, on a checkout and an installed package made up for it."""

import os
from pathlib import Path
import subprocess
import sys

import pytest
from upstream_suite import surprises

RUNNER = Path(__file__).with_name("upstream_suite.py")

HELPERS = "LIMIT = 3\n"
GOOD = """
import pytest
import bitsandbytes
from tests.helpers import LIMIT

@pytest.mark.parametrize("n", range(LIMIT))
def test_good(n):
    assert bitsandbytes.installed

@pytest.mark.slow
def test_slow():
    assert False

@pytest.mark.skip(reason="no such device")
def test_elsewhere():
    assert False

@pytest.mark.xfail
def test_known():
    assert False
"""
BAD = """
import pytest

def test_bad():
    assert False

@pytest.fixture
def broken():
    raise RuntimeError

def test_error(broken):
    pass
"""


@pytest.fixture
def checkout(tmp_path):
    installed = tmp_path / "installed" / "bitsandbytes"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("__version__ = '1.0'\ninstalled = True\n")
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    for name, text in {"__init__.py": "", "helpers.py": HELPERS, "test_good.py": GOOD}.items():
        (tests / name).write_text(text)
    # a package of the checkout must not be what is tested
    package = tests.parent / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package of the checkout was imported')")
    return tests.parent


def run(checkout, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(checkout.parent / "installed")}
    return subprocess.run([sys.executable, RUNNER, checkout, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_a_good_suite_is_counted_completely(checkout):
    before = sorted(checkout.rglob("*"))
    done = run(checkout, cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 0 failed, 0 error, 1 skipped, 1 xfailed, 0 xpassed, 1 deselected" in done.stdout
    assert "1 skipped: no such device" in done.stdout and "differences: none" in done.stdout
    assert sorted(checkout.rglob("*")) == before


def test_failures_and_errors_are_named(checkout, tmp_path):
    (checkout / "tests" / "test_bad.py").write_text(BAD)
    (checkout / "tests" / "test_broken.py").write_text("import no_such_module\n")
    done = run(checkout, cwd=tmp_path)
    assert done.returncode == 1
    assert "3 passed, 1 failed, 2 error" in done.stdout
    for name in ("test_bad.py::test_bad", "test_bad.py::test_error", "test_broken.py"):
        assert f"unexpected: tests/{name}" in done.stdout


def test_files_and_options_are_passed_on(checkout, tmp_path):
    (checkout / "tests" / "test_bad.py").write_text(BAD)
    done = run(checkout, "test_good.py", "-m", "slow", cwd=tmp_path)
    assert done.returncode == 1 and "0 passed, 1 failed" in done.stdout and "unexpected: tests/test_good.py::test_slow" in done.stdout
    assert "1 passed" in run(checkout, "test_good.py::test_good", "-k", "1", cwd=tmp_path).stdout


def test_running_nothing_is_no_success(checkout, tmp_path):
    done = run(checkout, "-k", "no_such_test", cwd=tmp_path)
    assert done.returncode == 1 and "nothing ran" in done.stdout


def test_a_folder_without_tests_is_refused(tmp_path):
    done = run(tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "checkout" in done.stderr


def test_expected_differences_are_neither_hidden_nor_outlived():
    table = {"tests/test_a.py::test_x": "on purpose"}
    assert surprises(["tests/test_a.py::test_x[1]", "tests/test_b.py::test_y"], [], table) == (["tests/test_b.py::test_y"], [])
    assert surprises([], ["tests/test_a.py::test_x[2]"], table) == ([], ["tests/test_a.py::test_x[2]"])
    assert surprises(["tests/test_a.py::test_x"], [], {}) == (["tests/test_a.py::test_x"], [])
