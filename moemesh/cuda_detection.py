"""Whether torch can compute on a GPU here, found out without importing torch where there is none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

_ROCM_DEVICE = "/dev/kfd"  # AMD's GPUs, which torch calls CUDA devices too
_ASK_TORCH = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"


def cuda_is_usable() -> bool:
    """Torch is asked, in a process of its own, only where there is a driver: its import takes more than a second."""
    return _has_driver() and subprocess.run([sys.executable, "-P", "-c", _ASK_TORCH], check=False).returncode == 0


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists(_ROCM_DEVICE)
    return True
