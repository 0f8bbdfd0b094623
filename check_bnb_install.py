"""Checks an installation of bitsandbytes: takes one optimizer step on the GPU, or on the CPU where there is none."""

from bitsandbytes.diagnostics.main import sanity_check

sanity_check()
print("SUCCESS!")
print("Installation was successful!")
