"""The build step of the package: compile the native libraries that this machine can compile, then collect the Python files.

CMake leaves each library in the package directory of the source tree, so that a wheel picks it up as package data and an editable
install uses it in place. What is built:

* by default the CPU library, and the CUDA one as well where both ``nvcc`` and an NVIDIA GPU are found (for that GPU only). A
  library that cannot be built is reported and left out: the package then computes with PyTorch operations instead.
* ``COMPUTE_BACKEND=cpu|cuda|hip`` builds that one, and fails if it cannot be built. The CPU library is built beside the one of a GPU, for the
  tensors that are not on it.
* ``BNB_SKIP_CMAKE=1`` builds nothing; a library that already lies in the package directory is used.

``CMAKE_ARGS`` is handed on to CMake. Everything else stands in ``pyproject.toml``.
"""

from __future__ import annotations

import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
import tempfile

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BACKENDS = ("cpu", "cuda", "hip")

NOT_BUILT = """
bitsandbytes: the native {backend} library was not built.
  Why:   {reason}
  So:    the package is installed and complete, but computes {backend} tensors with plain PyTorch operations: slower, same results up to rounding.
  Mend:  {remedy}, then install again with --force-reinstall --no-deps --no-cache-dir.
"""


class BuildError(Exception):
    """A native library could not be built. Carries what is missing and what to do about it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def find_nvcc() -> str | None:
    """The path of the CUDA compiler, from ``CUDACXX``, ``PATH`` or the usual toolkit directories."""
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(os.path.join(toolkit, "bin", "nvcc") for toolkit in toolkits)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def find_gpu_capabilities() -> list[str]:
    """The compute capabilities of the NVIDIA GPUs of this machine, as CMake wants them: ``["90"]`` for 9.0."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    capabilities = {line.strip().replace(".", "") for line in answer.stdout.splitlines()}
    return sorted(capability for capability in capabilities if capability.isdigit())


def wanted_builds(named: str) -> dict[str, list[str]]:
    """Backend -> CMake options, for an install that names a backend, or "" where that is left to the machine."""
    builds: dict[str, list[str]] = {"cpu": []}
    if named:
        return {named: []} | builds
    nvcc, capabilities = find_nvcc(), find_gpu_capabilities()
    if nvcc and capabilities:
        builds["cuda"] = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCOMPUTE_CAPABILITY={';'.join(capabilities)}"]
    return builds


def run(command: list[str]) -> tuple[int, str]:
    """Run a command, showing its output as it comes. Returns the exit status and the output."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def explain(output: str) -> BuildError:
    """Turn the output of a failed CMake run into what is missing and what to do."""
    for language, compiler in (("CXX", "C++"), ("CUDA", "CUDA"), ("HIP", "HIP")):
        if f"CMAKE_{language}_COMPILER" in output:
            hint = ' (Debian, Ubuntu: "apt install g++"; Fedora: "dnf install gcc-c++"; macOS: "xcode-select --install")' if language == "CXX" else ""
            return BuildError(f"no working {compiler} compiler was found", f"install one{hint}")
    tail = "\n         ".join([line for line in output.splitlines() if line.strip()][-8:])
    return BuildError(f"CMake or the compiler failed. The last lines were:\n         {tail}", "see all of it with `pip install -v`")


def build_library(backend: str, options: list[str]) -> None:
    """Configure and compile one native library into the package directory."""
    cmake = os.environ.get("CMAKE_EXECUTABLE") or shutil.which("cmake")
    if cmake is None:
        raise BuildError("CMake was not found", 'install it ("pip install cmake ninja")')
    generator = ["-G", "Ninja"] if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ else []
    settings = [f"-DCOMPUTE_BACKEND={backend}", "-DCMAKE_BUILD_TYPE=Release", *options, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    # A build directory of its own for every run: a kept one remembers the ninja of an isolated build environment that is gone.
    with tempfile.TemporaryDirectory(prefix="bitsandbytes-build-") as directory:
        steps = (
            [cmake, "-S", str(ROOT), "-B", directory, *generator, *settings],
            [cmake, "--build", directory, "--config", "Release", "--parallel", str(os.cpu_count() or 1)],
        )
        for step in steps:
            status, output = run(step)
            if status != 0:
                raise explain(output)


def announce(message: str) -> None:
    """Say something that a user should read. pip hides what a build prints, so the terminal, if there is one, is told as well."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            Path("/dev/tty").write_text(message)
        except OSError:
            pass  # no terminal: the build log has it


def build_native_libraries() -> None:
    """Build what the environment asks for, or else what this machine can build."""
    if os.environ.get("BNB_SKIP_CMAKE", "").lower() in ("1", "true", "yes"):
        return
    named = os.environ.get("COMPUTE_BACKEND", "").lower()
    if named and named not in BACKENDS:
        raise SystemExit(f"bitsandbytes: COMPUTE_BACKEND is {named!r}; it must be one of {', '.join(BACKENDS)}, or unset for what this machine has.")
    for backend, options in wanted_builds(named).items():
        try:
            build_library(backend, options)
        except BuildError as error:
            if backend == named:
                raise SystemExit(
                    f"bitsandbytes: COMPUTE_BACKEND={named} cannot be built.\n  Why:   {error.reason}\n  Mend:  {error.remedy}."
                ) from error
            announce(NOT_BUILT.format(backend=backend.upper(), reason=error.reason, remedy=error.remedy))


class BuildPyAfterNative(build_py):
    """Build the native libraries first: the Python step then finds them among the package data."""

    def run(self) -> None:
        build_native_libraries()
        super().run()


class PlatformWheel(bdist_wheel):
    """The libraries are loaded through ctypes: one wheel serves every Python 3, but only one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes setuptools treat the package as platform dependent although it has no extension modules."""

    def has_ext_modules(self) -> bool:
        return True


setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildPyAfterNative, "bdist_wheel": PlatformWheel})
