"""A recording as a function of JAX, compiled by XLA, which compiles in seconds what takes inductor tens of seconds.

`metarun.engine.jax_operations` has each operation of a recording, written with ``jax.numpy``. What is missing there is
named, and the run continues on another engine.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils.dlpack import from_dlpack

from metarun.data.cache import cache_dir
from metarun.engine.recorder import CannotRecord, memory_of, writes

Operation = Callable[..., Any]


def installed() -> bool:
    """Whether JAX can be imported."""
    return importlib.util.find_spec("jax") is not None


@cache
def jax_with_settings() -> Any:
    """Import JAX for steps that are small, in the types of torch, with compiled functions kept between runs.

    Raises:
        CannotRecord: JAX is not installed.
    """
    if not installed():
        raise CannotRecord("it needs JAX; install metarun[xla]")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((cache_dir() / "xla").absolute()))
    return jax


def compiled(graph: Graph, constants: nn.Module) -> Callable[..., list[Tensor]]:
    """Return the operations of ``graph`` as a compiled function of tensors on the CPU.

    Raises:
        CannotRecord: JAX is not installed, or an operation has no translation.
    """
    jax = jax_with_settings()
    # Imports JAX, which is needed with this engine alone.
    from metarun.engine.jax_operations import type_of

    operations, rewritten = operations_of(graph), rewritten_by(graph)

    def run(kept: dict[str, Any], given: Sequence[Any]) -> list[Any]:
        values: dict[Node, Any] = {}
        inputs = iter(given)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = kept[node.target]
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = typed(operations[node](*args, **kwargs), node.meta.get("dtype"))
                values.update(dict.fromkeys(rewritten.get(node, ()), values[node]))
            else:
                return list(map_arg(node.args[0], values.__getitem__))
        raise AssertionError("a recording ends with its output")

    def typed(value: Any, dtype: torch.dtype | None) -> Any:
        # Torch lets a number without axes take the type of the tensor that it meets.
        return value if dtype is None else jax.numpy.asarray(value, type_of(dtype))

    kept = {name: as_array(value) for name, value in constants.named_buffers()}
    jitted = jax.jit(run)

    # Most of what a step returns is given to the next one; a tensor and its array share memory.
    returned: list[tuple[Tensor, Any]] = []

    def step(*inputs: Tensor) -> list[Tensor]:
        known = {id(tensor): array for tensor, array in returned}
        arrays = [known[id(x)] if id(x) in known else as_array(x) for x in inputs]
        # JAX reads the memory of the inputs, which may change once this returns.
        results = jax.block_until_ready(jitted(kept, arrays))
        returned[:] = [(from_dlpack(result), result) for result in results]
        return [tensor for tensor, _ in returned]

    return step


def operations_of(graph: Graph) -> dict[Node, Operation]:
    """Return what each node of ``graph`` is in JAX; what writes into an argument is what returns the new value.

    Raises:
        CannotRecord: an operation has no translation.
    """
    from metarun.engine.jax_operations import translations

    table, found, missing = translations(), dict[Node, Operation](), set[str]()
    for node in graph.nodes:
        if node.op == "call_function":
            operation = node.target
            if writes(node):
                packet = getattr(torch.ops.aten, operation.overloadpacket.__name__.removesuffix("_"), None)
                operation = getattr(packet, operation._overloadname, None)
            if operation in table:
                found[node] = table[operation]
            else:
                missing.add(str(node.target))
    if missing:
        raise CannotRecord(f"{', '.join(sorted(missing))} cannot be translated to JAX")
    return found


def rewritten_by(graph: Graph) -> dict[Node, list[Node]]:
    """Return the earlier nodes whose value each writing operation replaces.

    Raises:
        CannotRecord: a view of the memory is there before the memory is written, and would have to change with it.
    """
    nodes = list(graph.nodes)
    writing = [node for node in nodes if writes(node)]
    if not writing:
        return {}
    memory, found = memory_of(graph), dict[Node, list[Node]]()
    for node in writing:
        found[node] = [other for other in nodes[: nodes.index(node)] if memory[other] is memory[node]]
        first, *later = found[node]
        if first.op != "call_function" or not all(writes(other) for other in later) or node.args[0] not in found[node]:
            raise CannotRecord(f"{node.target} writes into memory that is shared")
    return found


def as_array(value: Tensor) -> Any:
    """Return a tensor as an array of NumPy, which compiled functions take ten times as fast as arrays of JAX."""
    return value.detach().contiguous().numpy()
