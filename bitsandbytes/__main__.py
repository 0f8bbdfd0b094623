"""``python -m bitsandbytes``: see ``bitsandbytes.diagnostics``."""

import signal
import sys

from .diagnostics.main import run

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # a reader that has seen enough, such as head, ends this program like any other
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(run(sys.argv[1:]))
