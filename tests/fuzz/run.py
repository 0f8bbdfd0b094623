"""Fuzzes the readers for some minutes: run.py --minutes 10 [--target NAME] [--seed N]

The work is done by a child process, so that a crash is seen; target and seed of what failed are printed, and repeat it:
run.py --target NAME --seed N --rounds 1.
"""

import argparse
import faulthandler
import logging
from pathlib import Path
import resource
import subprocess
import sys
import time
import traceback
import warnings

HERE = Path(__file__).resolve().parent
EXAMPLES = 100  # of a target in one round
MEMORY = 12 << 30  # bytes of address space: what asks for more gets an error instead of the machine


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=0, help="end after so many rounds over the targets instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def fuzz(chosen: argparse.Namespace) -> int:
    """Runs rounds over the targets. Returns how many failures there were; prints each with what repeats it."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from hypothesis import HealthCheck, Phase, seed, settings  # after the paths are set, as the next
    import targets

    names = [chosen.target] if chosen.target else list(targets.TARGETS)
    configured = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=False, suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    runs = {name: configured(targets.TARGETS[name]) for name in names}
    ends = time.monotonic() + 60 * chosen.minutes
    failures, number, examples = 0, chosen.seed, 0
    while time.monotonic() < ends and not (chosen.rounds and number >= chosen.seed + chosen.rounds):
        for name, run in runs.items():
            print(f"begin --target {name} --seed {number}", flush=True)
            try:
                seed(number)(run)()
            except Exception:  # whatever a target raises is a finding
                failures += 1
                print(f"FAILED: run.py --target {name} --seed {number} --rounds 1\n{traceback.format_exc()}", flush=True)
            examples += EXAMPLES
        number += 1
    print(f"rounds: {number - chosen.seed}, inputs: {examples}", flush=True)
    return failures


def watch(arguments: list[str]) -> int:
    """Runs the child process and reports what it found, or what it died of. Returns the exit status."""
    child = subprocess.Popen([sys.executable, str(Path(__file__)), "--child", *arguments], stdout=subprocess.PIPE, text=True)
    last, failures = "", 0
    for line in child.stdout:
        if line.startswith("begin "):
            last = line.removeprefix("begin ").strip()
            continue
        failures += line.startswith("FAILED")
        print(line, end="", flush=True)
    status = child.wait()
    if status < 0:
        failures += 1
        print(f"FAILED: the process ended by signal {-status}: run.py {last} --rounds 1")
    print(f"{failures} failures")
    return int(failures > 0 or status != 0)


if __name__ == "__main__":
    chosen_options = options()
    sys.exit(min(fuzz(chosen_options), 1) if chosen_options.child else watch(sys.argv[1:]))
