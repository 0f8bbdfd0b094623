#!/usr/bin/env python3
"""Runs the tests of the published library against the package that is installed.

    python tests/upstream_suite.py CHECKOUT [TEST_FILE...] [PYTEST_OPTION...]

CHECKOUT is a checkout of the published repository, or any folder with its ``tests``. These are copied to a temporary folder, so that nothing
of the published package can be imported by mistake and nothing is written to the checkout. Like the published configuration, this leaves out
what is marked as slow, benchmark or deprecated; another ``-m`` decides otherwise. What was left out is counted, and why tests were skipped is said.

The exit status is 0 if exactly the tests of ``EXPECTED_DIFFERENCES`` fail, of those that ran.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
import shutil
import sys
import tempfile

import pytest

SELECTION = "not benchmark and not slow and not deprecated"

# Tests that fail on purpose, or whole groups of them by the beginning of their names ("tests/test_ops.py::TestInt8"), and why. There are none.
EXPECTED_DIFFERENCES: dict[str, str] = {}


class Outcomes:
    """A pytest plugin that keeps what became of every test."""

    def __init__(self):
        self.by_test: dict[str, str] = {}
        self.skip_reasons: Counter[str] = Counter()
        self.deselected = 0

    def pytest_deselected(self, items):
        self.deselected += len(items)

    def pytest_collectreport(self, report):
        if report.failed:
            self.by_test[report.nodeid] = "error"
        elif report.skipped:
            self._skip(report)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.by_test[report.nodeid] = "failed" if report.when == "call" else "error"
        elif report.skipped and not hasattr(report, "wasxfail"):
            self._skip(report)
        elif report.when == "call":
            expected_to_fail = hasattr(report, "wasxfail")
            self.by_test[report.nodeid] = {True: "xfailed", False: "xpassed"}[report.skipped] if expected_to_fail else "passed"

    def _skip(self, report):
        self.by_test[report.nodeid] = "skipped"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skip_reasons[reason.removeprefix("Skipped: ")] += 1

    def count(self, outcome: str) -> int:
        return sum(each == outcome for each in self.by_test.values())

    def names(self, *outcomes: str) -> list[str]:
        return [name for name, outcome in self.by_test.items() if outcome in outcomes]


def surprises(failing: Iterable[str], passing: Iterable[str], expected: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Compares results with a table of expected differences.

    Returns:
        The failing tests that it does not have, and the passing ones that it has.
    """
    groups = tuple(expected)
    return [name for name in failing if not name.startswith(groups)], [name for name in passing if name.startswith(groups)]


def report(outcomes: Outcomes, expected: Mapping[str, str]) -> bool:
    """Prints the result. Returns whether it is the expected one."""
    print("\n" + ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")), end="")
    print(f", {outcomes.deselected} deselected")
    for reason, count in outcomes.skip_reasons.most_common():
        print(f"  {count} skipped: {reason}")
    failing = outcomes.names("failed", "error")
    unexpected, mended = surprises(failing, outcomes.names("passed"), expected)
    for group, reason in expected.items():
        print(f"  {sum(name.startswith(group) for name in failing)} fail as expected: {group}: {reason}")
    for name in unexpected:
        print(f"  unexpected: {name}")
    for name in mended:
        print(f"  passes, although it is expected to fail: {name}")
    if not outcomes.names("passed", "failed", "error"):
        print("  nothing ran")
        return False
    print("differences: " + ("none" if not failing else "the expected ones" if not unexpected and not mended else "see above"))
    return not unexpected and not mended


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    published, rest = Path(arguments[0]) / "tests", arguments[1:]
    if not arguments[0] or not published.is_dir():
        print(f"{published} is not a folder; give a checkout of the published repository", file=sys.stderr)
        return 2
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]  # our own helpers are not theirs
    chosen = [argument for argument in rest if not argument.startswith("-") and (published / argument.split("::")[0]).exists()]
    options = [argument for argument in rest if argument not in chosen]
    if "-m" not in options:
        options = ["-m", SELECTION, *options]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shutil.copytree(published, Path(folder) / "tests")
        patch.chdir(folder)
        patch.syspath_prepend(folder)  # they import tests.helpers
        import bitsandbytes

        print(f"bitsandbytes {bitsandbytes.__version__} in {bitsandbytes.__path__[0]}, tests of {published}, {' '.join(options)}", flush=True)
        outcomes = Outcomes()
        paths = [f"tests/{name}" for name in chosen] or ["tests"]
        status = pytest.main(
            ["--rootdir", folder, "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", "--continue-on-collection-errors"]
            + options
            + paths,
            plugins=[outcomes],
        )
    as_expected = report(outcomes, EXPECTED_DIFFERENCES)
    ended = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not ended:
        print(f"pytest ended with {status!r}", file=sys.stderr)
    return 0 if as_expected and ended else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
