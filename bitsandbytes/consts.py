"""Where the package lies, how this platform names a shared library, and where to read more."""

from pathlib import Path
import platform

DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")

PACKAGE_DIR = Path(__file__).parent
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = f"{PACKAGE_GITHUB_URL}/blob/main/docs/source/nonpytorchcuda.mdx"
