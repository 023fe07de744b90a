"""Environments of their own for benchmarks whose packages do not go with those of the checkout. Knows no benchmark."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
TORCH = "torch==2.13.0"
QUIET = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def environment(name: str, *installs: tuple[str, ...]) -> Path:
    """The Python of the environment `name` in the cache folder, made on first use and when `installs` has changed.

    Each of `installs` is what one `pip install` is given, one after the other: what comes first holds for the rest.
    """
    folder = HOME / name
    python, made, wanted = folder / "venv" / "bin" / "python", folder / "made", repr(installs).replace(str(ROOT), "")
    if not made.is_file() or made.read_text(encoding="utf-8") != wanted:
        made.unlink(missing_ok=True)
        venv.create(folder / "venv", with_pip=True, clear=True)
        for packages in installs:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        made.write_text(wanted, encoding="utf-8")
    return python


def run(python: Path, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A module of the checkout run by the Python of an environment, its output kept; the network stays unused."""
    env: Mapping[str, str] = {**os.environ, **QUIET}
    return subprocess.run(
        [python, "-m", module, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
