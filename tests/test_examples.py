"""The programs in examples/, in their short form, as a user would start them."""

import os
from pathlib import Path
import subprocess
import sys

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments) -> str:
    """What a program prints. It must end well."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_fsdp2_qlora(tmp_path):
    said = run("fsdp2_qlora.py", "--tiny", "--steps", 4, "--output", tmp_path / "model")
    assert "resumed" in said and "loss of the exported model" in said
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]


def test_moe_experts():
    said = run("moe_experts.py", "--steps", 5)
    assert "NO " not in said and "identical logits" in said
