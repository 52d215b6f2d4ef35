"""Running a function once while its operations are recorded, in a list as short as can be without changing a bit.

``make_fx`` of torch records too, but makes a fake tensor with a stack trace for each operation, which takes ten times
as long; and up to a third of the operations that it records are views of views, or have been computed before.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


class CannotRecord(Exception):
    """The function cannot be recorded or compiled; the text says why."""


def depends_on_values(function: Any, args: Any) -> bool:
    """Whether an operation returns a number to Python, or a tensor whose shape depends on values."""
    if function is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def is_view(function: Any) -> bool:
    """Whether an operation returns its first argument's memory in another shape, and writes nothing."""
    aliases = [result.alias_info for result in function._schema.returns]
    return len(aliases) == 1 and aliases[0] is not None and not aliases[0].is_write


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same memory are the same tensor."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


class Recorder(TorchDispatchMode):
    """Inside, every operation that reaches the kernels is kept, in order, in a graph of torch.fx.

    Nodes have their shape in ``meta["shape"]`` and their dtype in ``meta["dtype"]``.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = Graph(), nn.Module()
        # Weak references: a step of images has more intermediate results than fit into memory.
        self.nodes: Any = WeakTensorKeyDictionary()
        for index, value in enumerate(inputs):
            self.keep(value, self.graph.placeholder(f"input_{index}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Being marked for torch's compiler would import all of the compiler, and nothing here is compiled."""
        return False

    def node_of(self, value: Any) -> Any:
        """Return the node that has made a tensor, or a new constant for a tensor from outside; other values as is."""
        if not isinstance(value, Tensor):
            return value
        node = self.nodes.get(value)
        if node is None:
            self.keep(value, node := self.constant(value.detach()))
        return node

    def constant(self, value: Tensor) -> Node:
        """Return a node for a tensor that is the same at every call."""
        name = f"constant_{len(self.constants._buffers)}"
        self.constants.register_buffer(name, value)
        return self.graph.create_node("get_attr", name)

    def keep(self, out: Any, node: Node) -> None:
        """Remember which node has made the tensors of ``out``."""
        if isinstance(out, Tensor):
            self.nodes[out] = node
            node.meta["shape"], node.meta["dtype"] = tuple(out.shape), out.dtype
        elif isinstance(out, tuple | list):
            for index, part in enumerate(out):
                if isinstance(part, Tensor | tuple | list):
                    self.keep(part, self.graph.call_function(operator.getitem, (node, index)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if depends_on_values(function, args):
            raise CannotRecord(f"{function} depends on values")
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise CannotRecord(f"{function} draws from a generator; take random numbers from metarun.random")
        if function is aten.lift_fresh.default and args[0] not in self.nodes:
            # A fresh tensor of numbers, into which later operations may write: in the recording, into a copy.
            self.keep(args[0], self.graph.call_function(aten.clone.default, (self.constant(args[0].clone()),)))
            return args[0]
        given = map_aggregate(args, self.node_of), map_aggregate(kwargs, self.node_of)
        out = function(*args, **kwargs)
        if isinstance(out, Tensor) and is_view(function) and self.is_the_same(function, out, args[0]):
            self.nodes[out] = given[0][0]
        else:
            self.keep(out, self.graph.call_function(function, *given))
        return out

    def is_the_same(self, function: Any, out: Tensor, of: Tensor) -> bool:
        """Whether a view is the whole tensor, whatever the strides of later inputs are."""
        return function is aten.detach.default or (same_layout(out, of) and self.nodes[of].op == "call_function")


VIEWS = (aten.view.default, aten._unsafe_view.default)


def simplified(graph: Graph) -> Graph:
    """Return ``graph`` without views of views, computations that are there already, and whatever nobody needs.

    The results are the same to the bit. What shares memory with a tensor that is written into stays as it is, and so
    does what reads it: before and after the writing, the same operation gives different results.
    """
    left_alone = written_into(graph)
    there: dict[tuple[Any, str], Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not left_alone.isdisjoint((node, *node.all_input_nodes)):
            continue
        source = node.args[0] if node.args else None
        if node.target in VIEWS and isinstance(source, Node) and source.target in VIEWS:
            node.args = (source.args[0], *node.args[1:])
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        # Nodes are written by their names, and numbers so that 1 is not 1.0.
        earlier = there.setdefault((node.target, f"{node.args} {node.kwargs}"), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
    graph.eliminate_dead_code()
    return graph


def written_into(graph: Graph) -> set[Node]:
    """Return every node that shares memory with one that an operation writes into."""
    written = [node for node in graph.nodes if writes(node)]
    if not written:
        return set()
    memory = memory_of(graph)
    touched = {memory[node] for node in written}
    return {node for node in graph.nodes if memory[node] in touched}


def writes(node: Node) -> bool:
    """Whether an operation writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def memory_of(graph: Graph) -> dict[Node, Node]:
    """Return for each node the same one of all nodes with which it shares memory."""
    representative: dict[Node, Node] = {}

    def of(node: Node) -> Node:
        while node in representative:
            node = representative[node]
        return node

    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            # Parts of a list share memory with it, if it is a list of views.
            sharing = list(node.args[:1]) if node.target is operator.getitem else []
        else:
            named = zip(schema.arguments, node.args, strict=False)
            sharing = [value for argument, value in named if argument.alias_info is not None]
            sharing += [node.kwargs[a.name] for a in schema.arguments if a.alias_info and a.name in node.kwargs]
        for value in sharing:
            for other in value if isinstance(value, tuple | list) else [value]:
                if isinstance(other, Node) and of(other) is not of(node):
                    representative[of(other)] = of(node)
    return {node: of(node) for node in graph.nodes}


def copied(graph: Graph) -> Graph:
    """Return a copy with separate nodes."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
