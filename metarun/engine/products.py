"""Products in compiled steps: what is multiplied in which order, and by which code."""

import logging
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from metarun.engine.recorder import copied

log = logging.getLogger(__name__)
aten = torch.ops.aten

NARROW = 16
PRODUCTS = aten.bmm.default, aten.mm.default
TRANSPOSES = aten.transpose.int, aten.t.default
ELEMENTWISE = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default
VIEWS = aten.view.default, aten.reshape.default, aten._unsafe_view.default
SOURCE = Path(__file__).with_name("products.cpp")
"""Products of small matrices, which libraries that run on a single thread call in place of torch's."""
FLAGS = "-O3", "-march=native", "-fPIC", "-std=c++17"


def with_fast_products(graph: Graph, constants: nn.Module) -> GraphModule:
    """Return a copy whose products are computed in another way, which the compiler does not choose by itself.

    - From transposed factors, where the result is only read transposed. Derivatives of weights would otherwise be added
      to others that lie in memory in the other order, for which a kernel takes several times as long. For the same
      reason, the terms of a sum are transposed instead of the sum.
    - From transposed factors, where there are few columns and many rows: MKL takes six times as long for
      ``[25, 40, 40] @ [25, 40, 10]`` as for ``[25, 10, 40] @ [25, 40, 40]``, and second derivatives are full of the
      former. The compiler makes transposing free.
    - As a multiplication, where a column is multiplied by a row. The compiler merges it with what comes before and
      after it.
    """
    graph = copied(graph)
    transpose_terms(graph)
    for node in graph.nodes:
        if node.target in VIEWS:
            # A product that replaces another has another memory layout, of which some views may be impossible.
            node.target = aten.reshape.default
        if node.target not in PRODUCTS:
            continue
        (a, b), (*batch, rows, columns) = node.args, node.meta["shape"]
        if batch and a.meta["shape"][2] == 1:
            node.target = aten.mul.Tensor
        elif (batch and columns < NARROW <= rows) or (is_read_transposed(node) and not rows < NARROW <= columns):
            transpose = partial(graph.call_function, aten.transpose.int)
            with graph.inserting_before(node):
                factors = transpose((b, -2, -1)), transpose((a, -2, -1))
                same = transpose((graph.call_function(node.target, factors), -2, -1))
            # A later product may look up its factor's shape.
            same.meta.update(node.meta)
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    return GraphModule(constants, graph)


def transpose_terms(graph: Graph) -> None:
    """Where a sum or another elementwise result is only read transposed, compute it from transposed terms instead."""
    waiting = [node for node in graph.nodes if node.target in TRANSPOSES]
    while waiting:
        node = waiting.pop()
        result = node.args[0]
        alike = all(term.meta.get("shape") == result.meta["shape"] for term in result.all_input_nodes)
        if result.target not in ELEMENTWISE or len(result.users) > 1 or not alike or not is_read_transposed(result):
            continue
        with graph.inserting_before(result):
            turned = {term: graph.node_copy(node, {node.args[0]: term}.__getitem__) for term in result.all_input_nodes}
            node.replace_all_uses_with(same := graph.node_copy(result, turned.__getitem__))
        same.meta.update(node.meta)
        for old in (node, result):
            graph.erase_node(old)
        waiting += turned.values()


def is_read_transposed(matrix: Node) -> bool:
    """Whether kernels read only the transpose of a matrix; products read both equally fast."""

    def orders(node: Node, transposed: bool) -> Iterator[bool]:
        for user in node.users:
            if user.target in TRANSPOSES:
                yield from orders(user, not transposed)
            elif user.target in VIEWS and user.meta["shape"] == node.meta["shape"]:
                yield from orders(user, transposed)
            elif user.target not in PRODUCTS:
                yield transposed

    return set(orders(matrix, False)) == {True}


def compiled_products(place: Path, threads: int) -> Path | None:
    """Compile ``SOURCE`` into a folder; None where the C++ compiler refuses, or MKL has several ``threads``."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    if threads > 1:
        return None
    path = place / "products.o"
    command = [get_cpp_compiler(), *FLAGS, "-c", str(SOURCE), "-o", str(path)]
    try:
        subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.debug("Products of small matrices are torch's own: %s", getattr(error, "stderr", error))
        return None
    return path
