"""Where the package lies, how this platform names a shared library, and where the published library has its source."""

from pathlib import Path
import platform

DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")

PACKAGE_DIR = Path(__file__).parent
# Names that programs read. They are about the published library: its maintainers are not the ones to ask about this one.
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = f"{PACKAGE_GITHUB_URL}/blob/main/docs/source/nonpytorchcuda.mdx"
