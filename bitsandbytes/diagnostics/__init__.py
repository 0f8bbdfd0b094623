"""``python -m bitsandbytes``: what is installed, what serves each operator, whether it computes rightly, and what to do where it does not.

``main`` prints; ``facts`` gathers, and documents the form of ``--json``; ``selfcheck`` compares operators with the reference; ``problems`` says
what to do.
"""
