"""What a wheel must do once it is installed: smoke_wheel.py FOLDER, run by the interpreter of an environment that it was installed into.

FOLDER: where the package must come from, so that nothing else on the path is tested by mistake.
"""

from pathlib import Path
import sys

import bitsandbytes as bnb
from bitsandbytes import cextension
from bitsandbytes.diagnostics import facts, main, problems


def smoke(folder: Path) -> list[str]:
    """What is wrong, in words."""
    found = []
    if folder.resolve() not in Path(bnb.__file__).resolve().parents:
        found.append(f"bitsandbytes comes from {bnb.__file__}, not from {folder}")
    known = facts.gather(bnb.__version__)
    if not known["library"]["loaded"]:
        found.append(f"the native library is not loaded: {known['library']['error']}")
    if facts.package_version("bitsandbytes") != bnb.__version__:
        found.append(f"the installed version is {facts.package_version('bitsandbytes')}, the package says {bnb.__version__}")
    found += [f"{problem['what']} {problem['do']}" for problem in problems.find(known)]
    if cextension.BNB_BACKEND == "CPU" and known["instruction_sets"]["used"] is None:
        found.append("the native library has no CPU kernels")
    main.sanity_check()
    return found


if __name__ == "__main__":
    wrong = smoke(Path(sys.argv[1]))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"bitsandbytes {bnb.__version__} from {Path(bnb.__file__).parent}: {'works' if not wrong else 'does not work'}")
    sys.exit(bool(wrong))
