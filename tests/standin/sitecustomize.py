"""Python imports this at its start, in each process that has this folder on PYTHONPATH: the processes that run.py starts, and theirs."""

from gpu import install

install()
