"""Every operator in Triton: for XPUs, and for any GPU that has no native build of the library.

The kernels compute what ``backends/default`` defines. ``ops.register`` makes them those of a device; nothing else in the library imports Triton, and
nothing here initialises a device.
"""

import importlib.util


def is_available() -> bool:
    """Whether Triton is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None
