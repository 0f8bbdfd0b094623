"""``python -m bitsandbytes``: see ``bitsandbytes.diagnostics``."""

import sys

from .diagnostics.main import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
