"""What is wrong with an installation, judged from its facts, and the one thing to do about each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
import os
from typing import Any

from packaging import version

from . import facts as gathering

OLDEST_CAPABILITY = (7, 5)
OLDEST_ROCM = "6.1"
# In a checkout of the source: the name of the distribution alone would fetch the published library.
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."


@dataclass(frozen=True)
class Problem:
    """Something to mend.

    Attributes:
        level: "error": something does not work; "warning": it works, but slower or otherwise than was asked for.
        what: what was found.
        do: the one thing to do.
    """

    level: str
    what: str
    do: str


def find(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The problems of an installation, errors first.

    Args:
        facts: what ``facts.gather`` gives.
    """
    finders = (_of_library, _of_gpu, _of_instruction_sets, _of_threads, _of_packages, _of_operators)
    found = [asdict(problem) for finder in finders for problem in finder(facts)]
    return sorted(found, key=lambda problem: problem["level"])


def _of_library(facts) -> Iterator[Problem]:
    library, backend = facts["library"], facts["backend"]
    if library["loaded"]:
        return
    reason = f"The native {backend} library is not loaded: {library['error']}"
    if backend in ("CUDA", "ROCm"):
        variable = f"BNB_{backend.upper()}_VERSION"
        if variable in facts["variables"]:
            remedy = f"Unset {variable}, which overrides the choice of the library."
        elif library["available"]:
            remedy = f"Install a PyTorch built for {backend} {' or '.join(library['available'])}, which this package has libraries for."
        else:
            remedy = f"Build the {backend} library in a checkout of the source: {REINSTALL}"
        yield Problem("error", reason, remedy)
    elif library["path"] is not None and os.path.exists(library["path"]):
        yield Problem("warning", f"{reason}. PyTorch operations serve instead, slower.", f"Build it again in a checkout of the source: {REINSTALL}")
    else:
        remedy = "Install a C++ compiler, then build the package again: " + REINSTALL
        yield Problem("warning", f"{reason}. PyTorch operations serve instead, slower.", remedy)


def _of_gpu(facts) -> Iterator[Problem]:
    if gathering.driver_without_runtime():
        yield Problem(
            "warning",
            "This machine has an NVIDIA driver, but this PyTorch was built for the CPU only.",
            "Install a PyTorch with CUDA if you want to use the GPU: https://pytorch.org/get-started/locally",
        )
    if facts["backend"] == "CUDA":
        if not facts["devices"]:
            yield Problem("error", "PyTorch counts a GPU but cannot use it.", 'See what python -c "import torch; torch.cuda.init()" says.')
        for device in facts["devices"]:
            if tuple(map(int, device["capability"].split("."))) < OLDEST_CAPABILITY:
                what = f"{device['name']} has compute capability {device['capability']}; LLM.int8() is slow below 7.5."
                yield Problem("warning", what, "Use 4-bit quantisation on this GPU.")
    hip = facts["environment"]["hip"]
    if hip is not None and version.parse(".".join(hip.split(".")[:2])) < version.parse(OLDEST_ROCM):
        yield Problem("warning", f"ROCm {hip} is older than {OLDEST_ROCM}.", f"Install a PyTorch for ROCm {OLDEST_ROCM} or newer.")


def _of_instruction_sets(facts) -> Iterator[Problem]:
    asked, sets = facts["variables"].get("BNB_CPU_ISA"), facts["instruction_sets"]
    if asked is None or sets["used"] is None or asked == sets["used"] == sets["best"]:
        return
    if asked not in gathering.INSTRUCTION_SETS:
        what = f"BNB_CPU_ISA={asked} names no instruction set, so it is ignored."
    elif asked not in sets["supported"]:
        what = f"BNB_CPU_ISA={asked} asks for instructions that this processor or this build lacks; {sets['used']} is used."
    else:
        what = f"BNB_CPU_ISA={asked} holds the CPU kernels back; this processor can run {sets['best']}."
    yield Problem("warning", what, f"Unset BNB_CPU_ISA, or set it to one of {', '.join(sets['supported'])}.")


def _of_threads(facts) -> Iterator[Problem]:
    threads = facts["threads"]
    if facts["instruction_sets"]["used"] is not None and threads["openmp"] is None and threads["processors"] != 1:
        yield Problem(
            "warning",
            "No OpenMP runtime is loaded, so the CPU kernels run on one thread.",
            "Install a PyTorch that is built with OpenMP, as the official wheels are.",
        )
    if len(threads["openmp_runtimes"]) > 1:
        yield Problem(
            "warning",
            f"Several OpenMP runtimes are in one process, whose threads compete for the processors: {', '.join(threads['openmp_runtimes'])}.",
            "Find which package brings the one that is not PyTorch's, and install a build of it that shares.",
        )


def _of_packages(facts) -> Iterator[Problem]:
    installed = gathering.package_version("bitsandbytes")
    if installed is not None and installed != facts["version"]:
        what = f"The package that runs is version {facts['version']}, the one that is installed is {installed}."
        yield Problem("warning", what, "Remove the one that you do not mean: pip uninstall bitsandbytes, or leave its folder.")


def _of_operators(facts) -> Iterator[Problem]:
    remedies = {
        "wrong": REINSTALL,
        "failed": REINSTALL,
        "died": "Set BNB_CPU_ISA=scalar, and report this with the output of python -m bitsandbytes",
    }
    for device in dict.fromkeys(row["device"] for row in facts["operators"]):
        rows = [row for row in facts["operators"] if row["device"] == device]
        for status, remedy in remedies.items():
            bad = [row for row in rows if row["check"] == status]
            if bad:
                names = ", ".join(row["operator"] for row in bad)
                yield Problem("error", f"Check {status} on {device}: {names}. First: {bad[0]['detail']}", remedy)
        if all(row["check"] == "not checked" for row in rows):
            yield Problem("error", f"The operators could not be checked on {device}: {rows[0]['detail']}", REINSTALL)
        elif device == "cpu" and facts["library"]["loaded"] and not facts["library"]["cpu_loaded"]:
            what = "The native library has no CPU kernels of this version, so PyTorch operations serve the CPU, slower."
            yield Problem("warning", what, f"Install library and package together: {REINSTALL}")
