"""A function of tensors, run once and kept as the list of operations that it came to.

``torch.func`` derives a meta-gradient anew at every call: nested transforms, a Python loop over inner steps, modules.
What reaches the kernels is the same list of operations every time, since nothing in a meta-step depends on values.
Recording keeps that list. It can be replayed as it is; handed to the compiler, which
then has nothing of Python left to understand; or captured as a CUDA graph.

A recording has the shapes of its examples, and constants where the function left torch and came back, so whoever uses
one compares it with the function on other inputs first.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from metarun.contracts import Tree
from metarun.data.cache import cache_dir
from metarun.errors import first_line
from metarun.tree import leaves, like, tree_map

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

    def compiled(self, given: Tree) -> "Recording":
        """The same operations in one compiled graph; ``given`` is what it is first run on.

        Raises:
            CannotRecord: there is no compiler, or it refuses the graph.
        """
        compiler_cache()
        # The compiler takes the recording itself: through ``torch.compile`` each call would first check that nothing
        # of its surroundings has changed, which costs as much as half of a small step.
        import torch._inductor

        other: Recording = object.__new__(Recording)
        other.__dict__.update(self.__dict__)
        # The compiler builds in how its inputs lie in memory, and batches of tasks may lie in one way or another.
        values: list[Any] = [leaf.contiguous() for leaf in leaves(given)]
        more = WITH_RANDOM_NUMBERS if draws_numbers(self.graph) else {}
        for options in (ON_CPU, {}) if values[0].device.type == "cpu" else ({},):
            try:
                with torch.no_grad():
                    graph = with_wide_products(self.graph)
                    compiled = torch._inductor.compile(graph, values, options=options | more)
                    other.run = on_contiguous(compiled)
                    other(given)
                break
            except Exception as error:
                if not options or isinstance(error, MemoryError):
                    raise CannotRecord(first_line(error)) from error
                log.debug("The compiler refused %s: %s", options, first_line(error))
        return other


def on_contiguous(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """``run`` on its inputs laid out one number after the other."""
    return lambda *inputs: run(*(x.contiguous() for x in inputs))


ON_CPU = {"cpp_wrapper": True, "layout_optimization": False}
"""Calls between kernels in C++, which leaves Python's lock to other threads, and images in the layout that they come
in: with both, tasks in threads take half of the time (docs/performance.md)."""
WITH_RANDOM_NUMBERS = {"realize_opcount_threshold": 12}
"""Values that are used twice are kept after fewer operations: the compiler repeats them in each of their uses, and a
line of ``metarun.random.mixed`` uses its input twice. Otherwise a normal number becomes 8,700 operations."""
NARROW = 16


def draws_numbers(graph: GraphModule) -> bool:
    """Whether there are random numbers from seeds (``metarun.random``) in the recording."""
    return any(node.target is torch.ops.aten.bitwise_xor.Tensor for node in graph.graph.nodes)


def with_wide_products(graph: GraphModule) -> GraphModule:
    """A copy in which batched products with few columns and many rows are those of the transposed factors.

    MKL takes six times as long for ``[25, 40, 40] @ [25, 40, 10]`` as for ``[25, 10, 40] @ [25, 40, 40]``, and the
    derivative of a derivative is full of the former. The compiler makes transposing free.
    """
    graph = deepcopy(graph)
    for node in graph.graph.nodes:
        # Stand-ins for values, each of a mode of its own, which the compiler would take for its inputs.
        node.meta.pop("val", None)
    product, transpose = torch.ops.aten.bmm.default, torch.ops.aten.transpose.int
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # A product put in another's place lies otherwise in memory, where a view of it may not be had.
            node.target = torch.ops.aten.reshape.default
        if node.target is product:
            (a, b), (_, rows, columns) = node.args, node.meta["tensor_meta"].shape
            if columns < NARROW <= rows and a.meta["tensor_meta"].shape[2] > 1:
                with graph.graph.inserting_before(node):
                    call = graph.graph.call_function
                    flipped = call(product, (call(transpose, (b, 1, 2)), call(transpose, (a, 1, 2))))
                    node.replace_all_uses_with(call(transpose, (flipped, 1, 2)))
                graph.graph.erase_node(node)
    graph.recompile()
    return graph


def compiler_cache() -> Path | None:
    """The folder where compiled graphs are kept between runs; torch's own variable moves it.

    None where ours cannot be written: the compiler then has its own, in the system's temporary folder.
    """
    variable = "TORCHINDUCTOR_CACHE_DIR"
    # Importing the compiler sets the variable to that temporary folder; the user has not asked for it.
    default = str(Path(tempfile.gettempdir(), "torchinductor_"))
    if not os.environ.get(variable, default).startswith(default):
        return Path(os.environ[variable])
    path = (cache_dir() / "compiled").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Only writing tells whether one may.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        log.debug("The compiler's cache cannot be written: %s", error)
        os.environ.pop(variable, None)
        return None
    os.environ[variable] = str(path)
    return path


class Captured:
    """A recording as a CUDA graph: one launch for all of its operations."""

    def __init__(self, recording: Recording, given: Tree) -> None:
        """Capture ``recording`` on the shapes of ``given``.

        Raises:
            CannotRecord: an operation that cannot be captured, one that waits for the host.
        """
        constants = [value for value in vars(recording.graph).values() if isinstance(value, Tensor)]
        constants += list(recording.graph.buffers())
        if any(not value.is_cuda for value in constants if value.numel() > 1):
            raise CannotRecord("it holds values that were computed outside of the GPU")
        self.inputs = tree_map(lambda leaf: leaf.contiguous().clone(), given)
        before = torch.cuda.current_stream()
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
            # Leaving a capture by an exception leaves its stream current.
            torch.cuda.set_stream(before)
            raise CannotRecord(first_line(error)) from error

    def __call__(self, given: Tree) -> Tree:
        """Copy ``given`` in, launch, copy the results out."""
        for own, new in zip(leaves(self.inputs), leaves(given), strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)


def release_gpu_memory() -> None:
    """Give back what torch keeps of a GPU's memory, if it can: after a capture that failed some versions refuse."""
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            log.debug("The GPU's memory stays with this process: %s", first_line(error))
