"""Implementations of the operators declared in ``bitsandbytes._ops``, one folder a device."""
