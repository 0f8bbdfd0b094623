"""`python -m bitsandbytes`: what it prints, that its self-check notices a wrong kernel, and what it says about broken installations.

Broken installations are real ones: a copy of the package with the library taken away or spoilt, run in a process of its own.
"""

import functools
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import bitsandbytes
from bitsandbytes import _ops, cextension
from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from bitsandbytes.diagnostics import facts, main, problems, selfcheck

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}"
on_cpu = pytest.mark.skipif(cextension.BNB_BACKEND != "CPU", reason="about machines without an accelerator")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="shared libraries as Linux has them")


def diagnose(folder: Path = PACKAGE_DIR.parent, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """`python -m bitsandbytes` of the package in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in facts.VARIABLES}
    environment |= {"PYTHONPATH": str(folder)} | variables
    command = [sys.executable, "-m", "bitsandbytes", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@functools.cache
def facts_of(folder: Path = PACKAGE_DIR.parent, **variables: str) -> dict:
    done = diagnose(folder, "--json", **variables)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_status"], done.stderr
    return found


def what_to_do(found: dict, about: str) -> str:
    """What the diagnosis tells the user to do about the one problem whose text contains `about`."""
    [problem] = [problem for problem in found["problems"] if about in problem["what"]]
    return problem["do"]


@pytest.fixture
def installation(tmp_path) -> Path:
    """A folder with a copy of the package that may be spoilt. The native library is there if it is built here."""
    shutil.copytree(PACKAGE_DIR, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------------ a sound installation
@on_cpu
def test_the_report_of_a_sound_installation():
    done = diagnose()
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0] == f" bitsandbytes v{bitsandbytes.__version__} ".center(60, "=")
    rows = iter(lines[1:])
    for beginning in ("Platform: ", *(["  libc: "] if sys.platform == "linux" else []), "Python: ", "PyTorch: ", "  CUDA: ", "  HIP: ", "  XPU: "):
        assert next(rows).startswith(beginning)
    assert next(rows) == "Related packages:"
    for name in ("accelerate", "diffusers", "numpy", "pip", "peft", "safetensors", "transformers", "triton", "trl"):
        assert re.fullmatch(rf"  {name}: (\d\S*|not found)", next(rows))
    assert next(rows) == "=" * 60
    assert next(rows) == "No CUDA, ROCm, or XPU detected; CPU library loaded successfully."
    assert lines[-1].startswith("SUCCESS")
    assert done.stderr == ""


def test_every_operator_is_listed_with_what_serves_it_and_agrees_with_the_reference():
    rows = [row for row in facts_of()["operators"] if row["device"] == "cpu"]
    assert [row["operator"] for row in rows] == list(_ops._CHECKS)
    assert {row["check"] for row in rows} == {"ok"}, [row for row in rows if row["check"] != "ok"]
    native = {row["operator"]: row["instruction_set"] for row in rows if row["backend"] == "cpu"}
    assert set(native) == {name for name, device in _ops._NATIVE if device == "cpu"}
    assert set(native.values()) == {cextension.cpu_lib.bnb_cpu_isa().decode()}


def test_json_has_the_keys_that_are_documented():
    found = facts_of()
    documented = re.findall(r"^``(\w+)``  ", facts.__doc__, re.MULTILINE)
    assert list(found) == documented
    page = (ROOT / "docs" / "source" / "reference" / "diagnostics.mdx").read_text()
    inner = [name for key in ("environment", "library", "instruction_sets", "threads") for name in found[key]]
    assert [name for name in [*documented, *inner] if f"`{name}`" not in page or f"``{name}``" not in facts.__doc__] == []
    assert found["schema"] == 1 and found["version"] == bitsandbytes.__version__
    for row in found["operators"]:
        assert list(row) == ["operator", "device", "backend", "instruction_set", "check", "detail"]
    assert found["threads"]["torch"] >= 1 and found["threads"]["processors"] >= 1
    assert found["instruction_sets"]["used"] in found["instruction_sets"]["supported"]


@on_linux
def test_threads_come_from_the_runtime_that_torch_brings():
    runtime = facts_of()["threads"]
    assert os.path.basename(runtime["openmp"]).startswith(("libgomp", "libiomp5", "libomp"))
    assert runtime["openmp_runtimes"] == [runtime["openmp"]]


def test_an_unknown_option_is_refused():
    done = diagnose(PACKAGE_DIR.parent, "--jsn")
    assert done.returncode == 2 and "--jsn" in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="about systems with pipes as POSIX has them")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_stops_early_is_no_error(options):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_DIR.parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "bitsandbytes", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == "" and process.returncode == -signal.SIGPIPE


def test_names_that_other_projects_call(capsys):
    assert main.get_package_version("torch") == torch.__version__
    assert main.get_package_version("no-such-distribution") == "not found"
    main.show_environment()
    assert capsys.readouterr().out.startswith("Platform: ")
    main.sanity_check()


def test_check_of_an_installation_takes_a_step():
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_DIR.parent)}
    done = subprocess.run([sys.executable, str(ROOT / "check_bnb_install.py")], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "SUCCESS!"


# ------------------------------------------------------------------------------------------------------------------------- the self-check
def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    right = selfcheck._operator("dequantize_4bit")
    monkeypatch.setattr(selfcheck, "_operator", lambda name: lambda *arguments: right(*arguments) * 1.001)
    outcome = selfcheck.check("dequantize_4bit", "cpu")
    assert outcome.status == "wrong" and re.search(r"values of result 0 are wrong: \S+ instead of \S+", outcome.detail)


@pytest.mark.parametrize("operator", _ops._CHECKS)
def test_every_check_notices_one_wrong_value(operator, monkeypatch):
    """Whatever the operator returns or writes, with one element of its largest result changed."""
    right = selfcheck._operator(operator)
    case = selfcheck.cases(torch.float32)[operator]

    def wrong(*arguments):
        returned = right(*arguments)
        results = [arguments[i] for i in case.written] or [arguments[-1] if returned is None else returned]
        largest = max(selfcheck._flattened(results), key=torch.Tensor.numel)
        largest.view(-1)[3] += 9 if largest.dtype != torch.bool else 1
        return returned

    monkeypatch.setattr(selfcheck, "_operator", lambda name: wrong)
    assert selfcheck.check(operator, "cpu").status == "wrong"


def test_a_kernel_that_raises_is_reported(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(selfcheck, "_operator", lambda name: broken)
    assert selfcheck.check("gemm_4bit", "cpu").detail.endswith(": RuntimeError: no kernel image")


def test_an_operator_that_ends_the_process_is_named(monkeypatch):
    """As an instruction does that the processor lacks."""
    end = "import os, signal; selfcheck._operator = lambda name: lambda *a: os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr(selfcheck, "_CHILD", selfcheck._CHILD.replace("selfcheck.report", f"{end}; selfcheck.report"))
    first, *rest = selfcheck.run("cpu")
    assert (first.status, first.detail) == ("died", "ended by SIGILL")
    assert {outcome.status for outcome in rest} == {"not checked"} and len(rest) == len(_ops._CHECKS) - 1


# ---------------------------------------------------------------------------------------------------------------- broken installations
@on_cpu
def test_a_missing_library_is_no_failure_but_slower(installation):
    (installation / "bitsandbytes" / LIBRARY).unlink(missing_ok=True)
    found = facts_of(installation)
    assert found["exit_status"] == 0 and not found["library"]["loaded"]
    assert {row["backend"] for row in found["operators"]} == {"default"} and {row["check"] for row in found["operators"]} == {"ok"}
    assert "C++ compiler" in what_to_do(found, "library is not loaded")
    text = diagnose(installation)
    assert text.returncode == 0 and "No CUDA, ROCm, or XPU detected; CPU library failed to load.\n" in text.stdout


@on_cpu
@pytest.mark.parametrize("content", [b"", b"not a library", "half"], ids=["empty", "text", "half"])
def test_a_corrupt_library_is_named_with_what_the_loader_said(installation, content):
    path = installation / "bitsandbytes" / LIBRARY
    path.write_bytes(path.read_bytes()[:500_000] if content == "half" else content)
    found = facts_of(installation)
    assert found["exit_status"] == 0 and found["library"]["path"] == str(path)
    assert str(path) in found["library"]["error"]
    assert what_to_do(found, found["library"]["error"]).startswith("Build it again")
    assert {row["check"] for row in found["operators"]} == {"ok"}


@on_cpu
@on_linux
def test_a_library_of_another_version_is_noticed(installation, tmp_path):
    """One that loads but has none of the functions."""
    path = installation / "bitsandbytes" / LIBRARY
    path.unlink(missing_ok=True)
    source = tmp_path / "other.c"
    source.write_text("int bnb_something_else(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    found = facts_of(installation)
    assert found["library"]["loaded"] and {row["backend"] for row in found["operators"]} == {"default"}
    assert what_to_do(found, "no CPU kernels of this version").startswith("Install library and package together")


@pytest.mark.parametrize(
    "value, about", [("sse9", "names no instruction set"), ("neon" if "avx2" in facts.instruction_sets()["supported"] else "avx2", "lacks")]
)
def test_an_instruction_set_that_cannot_be_had_is_a_warning(value, about):
    found = facts_of(BNB_CPU_ISA=value)
    assert found["exit_status"] == 0 and found["variables"]["BNB_CPU_ISA"] == value
    assert what_to_do(found, about).startswith("Unset BNB_CPU_ISA")


@pytest.mark.skipif(len(facts.instruction_sets()["supported"]) < 2, reason="the processor has one instruction set only")
def test_kernels_that_are_held_back_are_checked_as_asked_and_mentioned():
    found = facts_of(BNB_CPU_ISA="scalar")
    assert found["instruction_sets"]["used"] == "scalar"
    assert {row["check"] for row in found["operators"]} == {"ok"}
    assert "Unset BNB_CPU_ISA" in what_to_do(found, "holds the CPU kernels back")


HIDE_OPENMP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>

struct Visit { int (*callback)(struct dl_phdr_info*, size_t, void*); void* data; };

static int visit(struct dl_phdr_info* info, size_t size, void* pointer) {
    struct Visit* v = pointer;
    return strstr(info->dlpi_name, "libgomp") || strstr(info->dlpi_name, "libomp") || strstr(info->dlpi_name, "libiomp5") ? 0
           : v->callback(info, size, v->data);
}

int dl_iterate_phdr(int (*callback)(struct dl_phdr_info*, size_t, void*), void* data) {
    int (*next)(int (*)(struct dl_phdr_info*, size_t, void*), void*) = dlsym(RTLD_NEXT, "dl_iterate_phdr");
    struct Visit v = {callback, data};
    return next(visit, &v);
}
"""


@on_cpu
@on_linux
def test_a_missing_openmp_runtime_is_a_warning(tmp_path):
    """The runtime cannot be taken out of torch, so it is hidden from whoever looks for it."""
    source, shim = tmp_path / "hide.c", tmp_path / "hide.so"
    source.write_text(HIDE_OPENMP)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(shim), "-ldl"], check=True)
    found = facts_of(LD_PRELOAD=str(shim))
    assert found["threads"]["openmp"] is None and {row["check"] for row in found["operators"]} == {"ok"}
    if found["threads"]["processors"] > 1:
        assert "OpenMP" in what_to_do(found, "one thread")


@on_cpu
@on_linux
def test_two_openmp_runtimes_are_a_warning(tmp_path):
    source, second = tmp_path / "omp.c", tmp_path / "libiomp5.so"
    source.write_text("int omp_get_something(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(second)], check=True)
    found = facts_of(LD_PRELOAD=str(second))
    assert str(second) in found["threads"]["openmp_runtimes"]
    assert "the one that is not PyTorch's" in what_to_do(found, str(second))


# -------------------------------------------------------------------------------------------------------- machines that are not here
def sound(**changes) -> dict:
    """Facts of a machine where all is well."""
    facts_here = {
        "version": bitsandbytes.__version__,
        "environment": {"hip": None},
        "variables": {},
        "backend": "CPU",
        "devices": [],
        "library": {"path": None, "loaded": True, "error": None, "available": [], "cpu_loaded": True},
        "instruction_sets": {"used": "avx2", "best": "avx2", "supported": ["scalar", "avx2"]},
        "threads": {"torch": 2, "processors": 2, "openmp": "libgomp.so.1", "openmp_runtimes": ["libgomp.so.1"]},
        "operators": [{"operator": "gemm_4bit", "device": "cpu", "backend": "cpu", "instruction_set": "avx2", "check": "ok", "detail": ""}],
    }
    return facts_here | changes


@pytest.fixture(autouse=True)
def not_installed_elsewhere(monkeypatch):
    monkeypatch.setattr(facts, "package_version", lambda name, original=facts.package_version: None if name == "bitsandbytes" else original(name))


def test_where_all_is_well_there_is_nothing_to_do():
    assert problems.find(sound()) == []


UNLOADED = {"path": "x.so", "loaded": False, "error": "no binary found", "available": [], "cpu_loaded": True}
H100 = {"name": "H100", "capability": "9.0", "memory": 80 << 30}


@pytest.mark.parametrize(
    "changes, level, about, remedy",
    [
        (dict(backend="CUDA", devices=[H100], library=UNLOADED), "error", "CUDA library is not loaded: no binary found", "Build the CUDA library"),
        (dict(backend="CUDA", devices=[H100], library=UNLOADED | {"available": ["12.4", "12.8"]}), "error", "not loaded", "CUDA 12.4 or 12.8"),
        (
            dict(backend="CUDA", devices=[H100], library=UNLOADED, variables={"BNB_CUDA_VERSION": "110"}),
            "error", "not loaded", "Unset BNB_CUDA_VERSION",
        ),
        (dict(backend="ROCm", environment={"hip": "6.4.1"}, library=UNLOADED), "error", "ROCm library is not loaded", "ROCm library"),
        (dict(backend="CUDA", devices=[]), "error", "cannot use it", "torch.cuda.init"),
        (dict(backend="CUDA", devices=[H100 | {"name": "V100", "capability": "7.0"}]), "warning", "V100 has compute capability 7.0", "4-bit"),
        (dict(backend="ROCm", environment={"hip": "5.7.1"}), "warning", "ROCm 5.7.1 is older", "6.1"),
    ],
)  # fmt: skip
def test_what_is_said_about_gpus(changes, level, about, remedy):
    [problem] = problems.find(sound(**changes))
    assert problem["level"] == level and about in problem["what"] and remedy in problem["do"]


@pytest.mark.parametrize("capability", ["7.5", "8.0", "10.0", "12.0"])
def test_gpus_that_multiply_int8_are_no_problem(capability):
    assert problems.find(sound(backend="CUDA", devices=[H100 | {"capability": capability}])) == []


@pytest.mark.parametrize("check, remedy", [("wrong", "reinstall"), ("failed", "reinstall"), ("died", "BNB_CPU_ISA=scalar")])
def test_an_operator_that_does_not_work_is_an_error(check, remedy):
    [row] = sound()["operators"]
    [problem] = problems.find(sound(operators=[row | {"check": check, "detail": "seen"}]))
    assert problem["level"] == "error" and "gemm_4bit" in problem["what"] and "seen" in problem["what"] and remedy in problem["do"]


def test_errors_come_before_warnings():
    [row] = sound()["operators"]
    found = problems.find(sound(variables={"BNB_CPU_ISA": "what"}, operators=[row | {"check": "wrong"}]))
    assert [problem["level"] for problem in found] == ["error", "warning"]


def test_another_installed_version_is_a_warning(monkeypatch):
    monkeypatch.setattr(facts, "package_version", lambda name: "0.1.0")
    assert "0.1.0" in problems.find(sound())[0]["what"]


def test_main_exits_with_the_status(monkeypatch, capsys):
    [row] = sound()["operators"]
    monkeypatch.setattr(facts, "operators", lambda: [row | {"check": "wrong", "detail": "seen"}])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1 and "ERROR: " in capsys.readouterr().out
    monkeypatch.setattr(facts, "operators", lambda: [row])
    if cextension.BNB_BACKEND == "CPU":
        assert main.main() is None
