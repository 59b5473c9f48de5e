"""Walks through an autograd graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def node_of(tensor: Tensor) -> Any:
    """Return the node that a tensor comes from; that of a leaf is what takes its gradient."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def nodes(tensor: Tensor, *, around: Any = None) -> Iterator[Any]:
    """Go through the nodes that a tensor was computed by, but not through the node `around`."""
    seen = {around}
    waiting = [node_of(tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def nodes_between(source: Tensor, result: Tensor) -> Iterator[Any]:
    """Go through the nodes that computed one tensor from another; none where the first requires no gradient."""
    if not source.requires_grad:
        return
    users = defaultdict(list)
    for node in nodes(result):
        for following, _ in node.next_functions:
            users[following].append(node)
    seen = set()
    waiting = [node_of(source)]
    while waiting:
        for node in users[waiting.pop()]:
            if node not in seen:
                seen.add(node)
                waiting.append(node)
                yield node


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Go through the leaves, such as parameters, that a backward from a tensor reaches."""
    for node in nodes(tensor):
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
