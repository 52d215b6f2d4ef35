"""Recording a function of tensors: it is run once, and the list of operations that it executes is kept.

``torch.func`` derives a meta-gradient again at every call, through nested transforms, a Python loop over inner steps,
and modules. The kernels are given the same list of operations every time, since nothing in a meta-step depends on
values. Recording keeps that list. The list can be replayed as it is, handed to the compiler, which then has no Python
left to analyse, or captured as a CUDA graph.

A recording is specialised to the shapes of its example, and holds constants where the function left torch and came
back. Callers therefore first compare a recording with the function on other inputs.
"""

import logging
import random
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import GraphModule

from metarun.contracts import Tree
from metarun.engine import compiler, xla
from metarun.engine.recorder import CannotRecord, Recorder, simplified
from metarun.errors import first_line
from metarun.tree import leaves, like, tree_map

log = logging.getLogger(__name__)


class OtherShapes(CannotRecord):
    """A recording is given what it was not made for."""

    def __init__(self) -> None:
        super().__init__("batches of tasks differ in their shapes")


def leaves_of_shapes(given: Tree, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the leaves of a tree; sizes are constants of a recording.

    Raises:
        OtherShapes: they have other shapes, and what is compiled would read beyond its inputs.
    """
    values = list(leaves(given))
    if [value.shape for value in values] != shapes:
        raise OtherShapes
    return values


def with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the same numbers in memory as a recording knows them; it may hold views that no other layout allows.

    Raises:
        OtherShapes: the recording's numbers were stored once for a whole axis, and these are not.
    """
    if value.stride() == strides:
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=True)):
        raise OtherShapes
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


Function = Callable[[Tree], Tree]
"""A tree of tensors → a tree of tensors, without side effects."""


def drawn_outside_torch() -> tuple[Any, ...]:
    """Return what changes whenever Python's or NumPy's global generator gives a number."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, np.asarray(key).tobytes(), *rest


class Recording:
    """The operations of ``function``, as a function of the same trees."""

    def __init__(self, function: Function, given: Tree) -> None:
        """Run ``function`` once on ``given`` and keep its operations.

        Raises:
            CannotRecord: something in the function depends on values, or torch cannot trace it.
        """
        values = [leaf.detach() for leaf in leaves(given)]
        # In torch 2.6 the first map imports torch's compiler, whose imports call operations.
        vmap(torch.clone)(torch.zeros(1))
        recorder, before = Recorder(values), drawn_outside_torch()
        try:
            with recorder:
                out = function(like(given, iter(values)))
        except CannotRecord:
            raise
        except Exception as error:
            raise CannotRecord(first_line(error)) from error
        if drawn_outside_torch() != before:
            # Compared with the function, a recording that holds a rare event's absence would seem right.
            raise CannotRecord("it draws random numbers of Python or NumPy; take random numbers from metarun.random")
        recorder.graph.output([recorder.node_of(leaf) for leaf in leaves(out)])
        self.graph, self.constants = simplified(recorder.graph), recorder.constants
        self.shapes, self.strides = [value.shape for value in values], [value.stride() for value in values]
        self.outputs = tree_map(lambda leaf: None, out)
        self.operations = sum(node.op == "call_function" for node in self.graph.nodes)
        self.run: Callable[..., list[Tensor]] = GraphModule(self.constants, self.graph)

    def __call__(self, given: Tree) -> Tree:
        """Return what the function returns for ``given``, a tree of the shapes that it was recorded with.

        Raises:
            OtherShapes: the tree has other shapes.
        """
        values = leaves_of_shapes(given, self.shapes)
        if [value.stride() for value in values] != self.strides:
            values = [with_strides(*one) for one in zip(values, self.strides, strict=True)]
        return self.on(values)

    def on(self, values: Sequence[Tensor]) -> Tree:
        """Return what the function returns for the leaves of a tree, whatever their layout in memory."""
        with torch.no_grad():
            return like(self.outputs, iter(self.run(*values)))

    def other(self, run: Callable[..., list[Tensor]]) -> "Recording":
        """Return a recording of the same function whose operations are run by ``run``."""
        other: Recording = object.__new__(Recording)
        other.__dict__.update({**self.__dict__, "run": run})
        return other

    def replayed(self, given: Tree) -> "Recording":
        """Return the operations as a loop in C++, which takes 0.6 of the time of one in Python.

        This is TorchScript's interpreter without its optimizations, so that every kernel is the one that was recorded
        and results are the same to the bit. What it cannot run, what is on a GPU, and what has too many operations is
        run in Python.
        """
        values = [leaf.detach() for leaf in leaves(given)]
        if not values or values[0].is_cuda or self.operations > LARGEST_SCRIPT:
            return self
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # Torch advises to export models instead.
                warnings.simplefilter("ignore")
                script = torch.jit.trace(self.run, tuple(values), check_trace=False)  # type: ignore[no-untyped-call]
        except Exception as error:
            log.debug("TorchScript refuses the recording: %s", first_line(error))
            return self

        def run(*inputs: Tensor) -> list[Tensor]:
            with AS_WRITTEN:
                results: list[Tensor] = script(*inputs)
            return results

        return self.other(run)

    def by_xla(self, given: Tree) -> "Recording":
        """Translate the operations to JAX, whose compiler XLA compiles them for ``given``.

        Raises:
            CannotRecord: JAX cannot be used, or an operation has no translation.
        """
        return self.working([lambda: xla.compiled(self.graph, self.constants)], given)

    def compiled(self, given: Tree, at_once: int = 1) -> "Recording":
        """Compile the same operations into one graph, which is first run on ``given``.

        Args:
            given: an example of what the graph will be given.
            at_once: how many threads will run the graph at once.

        Raises:
            CannotRecord: there is no compiler, or the compiler refuses the graph.
        """
        # The compiler assumes the memory layout of its inputs, and batches of tasks may differ in their layout.
        values = [leaf.contiguous() for leaf in leaves(given)]
        return self.working(compiler.ways(self.graph, self.constants, values, at_once), given)

    def working(self, ways: Sequence[Callable[[], Callable[..., list[Tensor]]]], given: Tree) -> "Recording":
        """Return a recording whose operations are run by what the first of ``ways`` returns that runs on ``given``.

        Raises:
            CannotRecord: none can be made, or runs; the reason is that of the last.
        """
        *others, last = ways
        for make in others:
            try:
                return self.run_by(make, given)
            except CannotRecord as error:
                log.debug("One way to run a recording is none: %s", error)
        return self.run_by(last, given)

    def run_by(self, make: Callable[[], Callable[..., list[Tensor]]], given: Tree) -> "Recording":
        """Return a recording whose operations are run by what ``make`` returns, once it has run on ``given``.

        Raises:
            CannotRecord: it cannot be made, or does not run.
        """
        try:
            other = self.other(make())
            other(given)
        except (CannotRecord, MemoryError):
            raise
        except Exception as error:
            raise CannotRecord(first_line(error)) from error
        return other


class AsWritten:
    """Inside, TorchScript runs what is written, without optimizing it first; several threads may be inside at once."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch._C._get_graph_executor_optimize()
                torch._C._set_graph_executor_optimize(False)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch._C._set_graph_executor_optimize(self.before)


AS_WRITTEN = AsWritten()


LARGEST_SCRIPT = 5000
"""Operations above which TorchScript is not used: it takes a time to prepare that grows with their square, 0.2 s for a
thousand and 25 s for fifteen thousand."""


class Captured:
    """A recording as a CUDA graph, with one launch for all of its operations."""

    def __init__(self, recording: Recording, given: Tree) -> None:
        """Capture ``recording`` on the shapes of ``given``.

        Raises:
            CannotRecord: an operation cannot be captured because it waits for the host.
        """
        if any(not value.is_cuda for value in recording.constants.buffers() if value.numel() > 1):
            raise CannotRecord("it holds values that were computed outside of the GPU")
        self.inputs, self.shapes = tree_map(lambda leaf: leaf.contiguous().clone(), given), recording.shapes
        before, values = torch.cuda.current_stream(), list(leaves(self.inputs))
        try:
            # A capture must not be the first use of a library, so the operations first run on a separate stream.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    recording.on(values)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = recording.on(values)
        except RuntimeError as error:
            # If a capture ends with an exception, its stream remains the current one.
            torch.cuda.set_stream(before)
            raise CannotRecord(first_line(error)) from error

    def __call__(self, given: Tree) -> Tree:
        """Copy ``given`` in, launch the graph, and copy the results out; raise as a recording does."""
        copy_all(list(leaves(self.inputs)), leaves_of_shapes(given, self.shapes))
        self.graph.replay()
        found: Tree = tree_map(torch.empty_like, self.outputs)
        copy_all(list(leaves(found)), list(leaves(self.outputs)))
        return found


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes: those of one type in a single launch."""
    for kind in dict.fromkeys(own.dtype for own in into):
        pairs = [(own, new) for own, new in zip(into, values, strict=True) if own.dtype == kind]
        torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs], non_blocking=True)


def release_gpu_memory() -> None:
    """Release the GPU memory that torch caches, if possible: some versions refuse after a failed capture."""
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            log.debug("The GPU's memory stays with this process: %s", first_line(error))
