"""How much memory the process took at most. Knows the platform; refuses to know what it was used for."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> None:
    """Begin a new measurement, where the platform can (CUDA and Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            _RESET.write_text("5")
        except OSError:  # a container may forbid it; then the peak is that of the whole process
            return


def peak_mb() -> float:
    """Peak megabytes since then: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    if sys.platform == "linux":
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
