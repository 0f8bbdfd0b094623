"""Operators on NVIDIA GPUs, and on AMD's by the same sources, by the native library."""
