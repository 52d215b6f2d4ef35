"""A library that inductor has compiled, called through its C interface (``torch/csrc/inductor/aoti_runtime``).

Torch's own class for it keeps Python's lock during a call. Through ``ctypes`` other threads have it, and run the same
library at once. A call takes 10 µs more.
"""

import ctypes
import weakref
from ctypes import POINTER, byref, c_char_p, c_size_t, c_void_p, py_object, pythonapi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarun.engine.recorder import CannotRecord

pointer_of = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))
capsule_of = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", pythonapi))


class Library:
    """Runs a library, in several threads at once if wanted; results are new tensors."""

    def __init__(self, path: Path, at_once: int) -> None:
        """Load the library at ``path``, to be run by up to ``at_once`` threads at once.

        Raises:
            OSError: it cannot be loaded.
            CannotRecord: it refuses to start.
        """
        self.library, self.handle = ctypes.CDLL(str(path)), c_void_p()
        self.call("CreateWithDevice", byref(self.handle), c_size_t(at_once), c_char_p(b"cpu"), c_char_p(None))
        # Deleting must not refer to ``self``, which would keep it.
        weakref.finalize(self, self.library.AOTInductorModelContainerDelete, self.handle)
        count = c_size_t()
        self.call("GetNumOutputs", self.handle, byref(count))
        self.outputs = count.value
        self.run = self.library.AOTInductorModelContainerRun
        self.run.argtypes = [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_void_p), c_size_t, c_void_p, c_void_p]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the container.

        Raises:
            CannotRecord: it fails.
        """
        if getattr(self.library, f"AOTInductorModelContainer{name}")(*arguments):
            raise CannotRecord(f"the compiled library fails in {name}")

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the leaves of the output for the leaves of the input.

        Raises:
            RuntimeError: the library fails; it has written the reason to the error stream.
        """
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        given = (c_void_p * len(inputs))(*[pointer_of(capsule, None) for capsule in capsules])
        found = (c_void_p * self.outputs)()
        # The library takes over what ``given`` points to.
        if self.run(self.handle, given, len(inputs), found, self.outputs, None, None):
            raise RuntimeError("the compiled library has failed")
        results = [capsule_of(pointer, None, None) for pointer in found]
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(results)
