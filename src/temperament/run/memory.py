"""How much memory this process holds, and held at most since it was last asked to watch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import torch


def resident() -> int:
    """Bytes of the process that lie in memory now."""
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss


def watch() -> Callable[[], int]:
    """Start watching; the function returned says the most bytes held since: allocated tensors on a GPU, the whole process else.
    Where the system cannot forget an old peak (not Linux), the most since the process began."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    import resource

    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
