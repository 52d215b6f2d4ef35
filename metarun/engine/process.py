"""Settings of the process that a run needs, and measurements of the process."""

import ctypes
import logging
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig

from metarun.engine.recording import release_gpu_memory

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Constants of glibc's ``malloc.h``."""
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Linux's information on this process."""


def keep_freed_memory() -> None:
    """Tell glibc not to hand large freed blocks back to the system, only to fault them in again each step.

    Convolutions on a CPU become up to twice as fast. The call has no effect where the C library has no such setting.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def reset_peak_memory(device: str) -> None:
    """Reset the high-water mark of memory, where the system allows it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            # Memory freed by an earlier job of a sweep is returned to the system first.
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
            CLEAR_REFS.write_text("5")
        except OSError:
            log.debug("The peak of memory cannot be reset, so it is that of the whole process.")


def peak_memory_mb(device: str) -> float:
    """Return the high-water mark in MB: of the GPU's allocations, else of the process's resident memory.

    NaN on Windows, which does not say.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return math.nan
    # macOS counts bytes, the other systems kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e6


@contextmanager
def rounding_of(config: DictConfig) -> Iterator[None]:
    """Inside, a GPU computes products and convolutions as ``train.precision`` says; afterwards as it did before."""
    precision, rounded_before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    rounded = config.train.precision.name == "tf32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    # Torch's default rounds convolutions, unlike products.
    torch.backends.cudnn.allow_tf32 = rounded
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = rounded_before


@contextmanager
def settings_of(config: DictConfig) -> Iterator[None]:
    """Inside, the process has the settings that a run needs; they are undone afterwards, as a sweep's jobs share it."""
    threads = torch.get_num_threads()
    if config.engine.keep_memory:
        keep_freed_memory()
    try:
        with rounding_of(config):
            yield
    finally:
        torch.set_num_threads(threads)
        # Compiled graphs of one job are useless to the next.
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.reset()
        release_gpu_memory()
