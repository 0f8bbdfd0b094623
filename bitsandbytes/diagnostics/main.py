"""The command ``python -m bitsandbytes``."""

import argparse
import json
import sys
from typing import Any

import torch

from .. import __version__, cuda_specs
from ..optim import Adam
from . import facts as gathering
from . import problems

WIDTH = 60
_UNKNOWN = "N/A"


# ----------------------------------------------------------------------------------------------------------- what others may call


def main() -> None:
    """Prints the diagnosis of this installation.

    Raises:
        SystemExit: with status 1, if something does not work.
    """
    status = run([])
    if status:
        sys.exit(status)


def sanity_check() -> None:
    """Takes one step of Adam on the accelerator, or on the CPU where there is none, and looks at what it did.

    Raises:
        RuntimeError: the parameter did not move by the learning rate against its gradient, as the first step of Adam does.
    """
    device = {"CUDA": "cuda", "ROCm": "cuda", "XPU": "xpu"}.get(gathering.cextension.BNB_BACKEND, "cpu")
    learning_rate = 0.01
    parameter = torch.nn.Parameter(torch.linspace(1.0, 2.0, 100, device=device))
    before = parameter.detach().clone()
    optimizer = Adam([parameter], lr=learning_rate)
    (parameter * torch.linspace(0.5, 1.0, 100, device=device)).sum().backward()
    optimizer.step()
    moved = before - parameter.detach()
    if not torch.allclose(moved, torch.full_like(moved, learning_rate), rtol=1e-3):
        raise RuntimeError(f"a step of Adam on {device} moved the parameter by {moved.mean().item():.3g} instead of {learning_rate}")


def get_package_version(name: str) -> str:
    """The installed version of a distribution, or "not found"."""
    return gathering.package_version(name) or gathering.NOT_FOUND


def show_environment() -> None:
    """Prints the platform and the versions of this package's neighbours."""
    _print_environment(gathering.environment())


# ------------------------------------------------------------------------------------------------------------------- the command


def run(arguments: list[str]) -> int:
    """The command.

    Args:
        arguments: those of the command line.

    Returns:
        The exit status: 0, or 1 where something does not work.
    """
    parser = argparse.ArgumentParser(prog="python -m bitsandbytes", description="What this installation of bitsandbytes is and whether it works.")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object (its keys: bitsandbytes/diagnostics/facts.py)")
    as_json = parser.parse_args(arguments).json
    if not as_json:
        print(f" bitsandbytes v{__version__} ".center(WIDTH, "="))
        show_environment()
        print("=" * WIDTH)

    facts = gathering.gather(__version__)
    facts["problems"] = problems.find(facts)
    if facts["library"]["loaded"] and not facts["problems"]:
        facts["problems"] += _problems_of_a_step()
    errors = [problem for problem in facts["problems"] if problem["level"] == "error"]
    facts["exit_status"] = int(bool(errors))
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_accelerator(facts)
        _print_details(facts)
        _print_problems(facts)
    return facts["exit_status"]


def _problems_of_a_step() -> list[dict[str, str]]:
    try:
        sanity_check()
    except Exception as error:  # whatever a broken installation raises is what there is to report
        return [{"level": "error", "what": f"A step of Adam failed: {error}", "do": problems.REINSTALL}]
    return []


def _print_environment(environment: dict[str, Any]) -> None:
    print(f"Platform: {environment['platform']}")
    if environment["libc"] is not None:
        print(f"  libc: {environment['libc']}")
    print(f"Python: {environment['python']}")
    print(f"PyTorch: {environment['torch']}")
    for runtime in ("cuda", "hip", "xpu"):
        print(f"  {runtime.upper()}: {environment[runtime] or _UNKNOWN}")
    print("Related packages:")
    for name, version in environment["packages"].items():
        print(f"  {name}: {version or gathering.NOT_FOUND}")


def _print_accelerator(facts: dict[str, Any]) -> None:
    backend = facts["backend"]
    status = "loaded successfully" if facts["library"]["loaded"] else "failed to load"
    if backend == "CPU":
        print(f"No CUDA, ROCm, or XPU detected; CPU library {status}.")
    elif backend == "XPU":
        print(f"XPU detected; its library {status}.")
    else:
        specs = cuda_specs.get_cuda_specs()
        if specs is not None:
            capability = f", Highest Compute Capability: {specs.highest_compute_capability}" if backend == "CUDA" else ""
            print(f"PyTorch settings found: {backend.upper()}_VERSION={specs.cuda_version_string}{capability}.")
        print(f"{backend} detected; its library {status}.")


def _print_details(facts: dict[str, Any]) -> None:
    sets, threads = facts["instruction_sets"], facts["threads"]
    print(f"Native library: {facts['library']['path'] or gathering.NOT_FOUND}")
    if sets["used"] is not None:
        print(f"  Instruction set: {sets['used']} (this machine can run {', '.join(sets['supported'])})")
    print(f"Threads: {threads['torch']} of {threads['processors']} processors, OpenMP runtime: {threads['openmp'] or gathering.NOT_FOUND}")
    for device in facts["devices"]:
        print(f"Device: {device['name']}, {device['capability'] or ''} {device['memory'] / 2**30:.1f} GiB")
    for name, value in facts["variables"].items():
        print(f"Environment: {name}={value}")
    print("Operators, each compared with the PyTorch reference:")
    for row in facts["operators"]:
        served = row["backend"] + (f" ({row['instruction_set']})" if row["instruction_set"] else "")
        print(f"  {row['device']:<5}{row['operator']:<33}{served:<20}{row['check']}")


def _print_problems(facts: dict[str, Any]) -> None:
    for problem in facts["problems"]:
        print(f"\n{problem['level'].upper()}: {problem['what']}\n  Do: {problem['do']}")
    if facts["exit_status"] == 0:
        print("SUCCESS!" if not facts["problems"] else "\nSUCCESS, with warnings.")
