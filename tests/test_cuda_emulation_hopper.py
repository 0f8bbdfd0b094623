"""The emulation of what only sm_90a has notices what hardware would leave undefined."""

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
    cuda = ROOT / "csrc" / "cuda"
    emulation = [cuda / "emulation.cpp", cuda / "emulation_hopper.cpp", "-x", "c++", cuda / "runtime.cu"]
    sources = [ROOT / "tests" / "emulation_hopper_faults.cpp", *emulation]
    options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-DBNB_CUDA_EMULATION=1", "-pthread"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    return lambda name: subprocess.run([str(program), name], capture_output=True, text=True, timeout=60)


def test_a_product_of_a_warp_group_is_computed(run_case):
    done = run_case("right")
    assert done.returncode == 0 and int(done.stdout) == 0, done.stderr


def test_a_descriptor_is_read_bit_by_bit(run_case):
    """With another distance of eight rows the operand is another."""
    done = run_case("other_stride")
    assert done.returncode < 0 or int(done.stdout) > 0


def test_a_tile_wider_than_its_swizzle_is_refused(run_case):
    assert run_case("narrow_swizzle").returncode == 5


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_barrier", "has not been initialised"),
        ("no_barrier_fence", "before the fence behind its initialisation"),
        ("too_few_arrivals", "128 wait for a phase of a barrier"),
        ("too_many_arrivals", "more than 2 arrivals"),
        ("other_bytes", "128 wait for a phase of a barrier"),
        ("misaligned_tile", "not aligned to 128 bytes"),
        ("no_wait_for_copy", "a block has ended while memory was still at work"),
        ("no_fence", "written behind the last fence"),
        ("no_second_fence", "written behind the last fence"),
        ("no_commit", "a block has ended while products of a warp group were under way"),
        ("no_wait", "a block has ended while products of a warp group were under way"),
        ("touched_registers", "in registers was touched while the product was under way"),
        ("touched_memory", "in shared memory was touched while the product was under way"),
        ("touched_sums", "sums of a warp group were touched"),
        ("some_threads", "are in operations of warp groups"),
        ("different_operands", "bring different operands"),
        ("other_bits", "bits where there must be none"),
        ("operand_outside", "not in dynamic shared memory"),
    ],
)
def test_faults_end_the_process_with_a_message(run_case, name, words):
    done = run_case(name)
    assert done.returncode < 0 and words in done.stderr, done.stderr
