"""A function of tensors, run once and kept as the list of operations that it came to.

``torch.func`` derives a meta-gradient anew at every call: nested transforms, a Python loop over inner steps, modules.
What reaches the kernels is the same list of operations every time, since nothing in a meta-step depends on values.
Recording keeps that list. It can be replayed as it is, with the same numbers to the bit; handed to the compiler, which
then has nothing of Python left to understand; or captured as a CUDA graph.

A recording has the shapes of its examples, and constants where the function left torch and came back, so whoever uses
one compares it with the function on other inputs first.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from metarun.data.cache import cache_dir
from metarun.errors import first_line
from metarun.tree import leaves, like, tree_map
from metarun.types import Tree

log = logging.getLogger(__name__)

Function = Callable[[Tree], Tree]
"""A tree of tensors → a tree of tensors, without side effects."""


class CannotRecord(Exception):
    """The function cannot be recorded or compiled; the text says why."""


class Recording:
    """The operations of ``function``, as a function of the same trees."""

    def __init__(self, function: Function, given: Tree) -> None:
        """Run ``function`` once on ``given`` and keep what it did.

        Raises:
            CannotRecord: something in it depends on values, or torch cannot follow it.
        """
        kept: list[Tree] = []

        def flat(*values: Tensor) -> list[Tensor]:
            out = function(like(given, iter(values)))
            kept.append(tree_map(lambda leaf: None, out))
            return list(leaves(out))

        try:
            self.graph: GraphModule = make_fx(flat)(*leaves(given))
        except Exception as error:
            raise CannotRecord(first_line(error)) from error
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()
        self.outputs = kept[-1]
        self.operations = sum(node.op == "call_function" for node in self.graph.graph.nodes)
        self.run: Callable[..., list[Tensor]] = self.graph

    def __call__(self, given: Tree) -> Tree:
        """What the function returns for ``given``, trees of the shapes that it was recorded with."""
        with torch.no_grad():
            return like(self.outputs, iter(self.run(*leaves(given))))

    def marker(self) -> Any:
        """A file beside the compiler's own cache that is there once this very recording was compiled."""
        text = f"{torch.__version__} {self.graph.code} {torch.get_num_threads()}"
        return compiler_cache() / f"metarun-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def compiled(self, given: Tree) -> "Recording":
        """The same operations in one compiled graph; ``given`` is what it is first run on.

        Raises:
            CannotRecord: there is no compiler, or it refuses the graph.
        """
        compiler_cache()
        other: Recording = object.__new__(Recording)
        other.__dict__.update(self.__dict__)
        other.run = torch.compile(self.graph, fullgraph=True, dynamic=False)
        began = time.perf_counter()
        try:
            other(given)
        except Exception as error:
            raise CannotRecord(first_line(error)) from error
        try:
            self.marker().write_text(f"{time.perf_counter() - began:.1f} s\n")
        except OSError as error:
            log.debug("No mark of the compilation was left: %s", error)
        return other


def compiler_cache() -> Any:
    """The folder where compiled graphs are kept between runs; torch's own variable moves it."""
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    path = cache_dir().joinpath(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.debug("The compiler's cache cannot be made: %s", error)
    return path


class Captured:
    """A recording as a CUDA graph: one launch for all of its operations."""

    def __init__(self, recording: Recording, given: Tree) -> None:
        """Capture ``recording`` on the shapes of ``given``.

        Raises:
            CannotRecord: an operation that cannot be captured, one that waits for the host.
        """
        self.inputs = tree_map(lambda leaf: leaf.contiguous().clone(), given)
        try:
            # A capture must not be the first use of a library, so a stream of its own runs the operations before.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    recording(self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = recording(self.inputs)
        except RuntimeError as error:
            raise CannotRecord(first_line(error)) from error

    def __call__(self, given: Tree) -> Tree:
        """Copy ``given`` in, launch, copy the results out."""
        for own, new in zip(leaves(self.inputs), leaves(given), strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)
