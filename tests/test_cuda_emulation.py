"""The emulation that runs CUDA kernels on the CPU notices what hardware would leave undefined."""

from pathlib import Path
import shutil
import subprocess

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run_case(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("emulation") / "faults"
    sources = [ROOT / "tests" / "emulation_faults.cpp", ROOT / "csrc" / "cuda" / "emulation.cpp", "-x", "c++", ROOT / "csrc" / "cuda" / "runtime.cu"]
    options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-DBNB_CUDA_EMULATION=1", "-pthread"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    return lambda name: subprocess.run([str(program), name], capture_output=True, text=True, timeout=60)


def test_a_kernel_that_waits_in_every_way_is_run_to_its_end(run_case):
    done = run_case("right")
    assert done.returncode == 0, done.stderr
    # Of each warp 16 lanes add the sum of one other lane of the warp, and half of the even lanes vote in one of the two warps.
    first, second = (sum(63 - i for i in lanes) for lanes in (range(32), range(32, 64)))
    sums = 32 * first + 16 * first + 32 * second + 16 * (second + 16) + 32 * 31 + 32 * 63 + 64 * 1 + 64 * 1000
    status, one, other, status_of_too_much = map(int, done.stdout.split())
    assert (status, one, other, status_of_too_much) == (0, sums, sums, 5)


@pytest.mark.parametrize("name", ["missing_barrier", "missing_wait"])
def test_memory_that_was_not_written_yet_holds_no_numbers(run_case, name):
    assert int(run_case(name).stdout.split()[1]) > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("barrier_of_some", "wait for others that never come: of 64, 40 are at a barrier"),
        ("different_barriers", "wait at different barriers"),
        ("different_masks", "32 in warp operations (mask 0xffffffff), 32 have ended"),
        ("lane_outside_mask", "whose mask 0xfffffffe leaves it out"),
        ("value_of_absent_lane", "wants the value of lane 1, which the mask"),
        ("lane_that_ended", "31 in warp operations (mask 0xffffffff)"),
        ("beyond_variable", "wrote outside a variable in shared memory"),
        ("beyond_dynamic", "wrote outside a variable in shared memory"),
        ("too_much_static", "52000 bytes of static shared memory"),
        ("misaligned_copy", "an address is not aligned"),
    ],
)
def test_faults_end_the_process_with_a_message(run_case, name, words):
    done = run_case(name)
    assert done.returncode < 0 and words in done.stderr
