"""What a graph was, to go back to when a rewrite that has replaced and erased nodes fails."""

from __future__ import annotations

from torch.fx import Graph, Node
from torch.fx.node import map_arg


class Snapshot:
    """The nodes of a graph, and what they were: a few references for each, so that it costs next to nothing to take.

    Only :meth:`restore` makes nodes. Values in the metadata are shared, not copied.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes = [(node, node.args, node.kwargs, dict(node.meta)) for node in graph.nodes]

    def restore(self) -> None:
        """Make the graph what it was: the same nodes in the same order, with those that were erased made anew.

        What is made anew has another name, as names are never free again.
        """
        graph, alive = self.graph, set(self.graph.nodes)
        anew: dict[Node, Node] = {}
        for node, *_ in self._nodes:
            if node not in alive:
                anew[node] = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)

        def now(node: Node) -> Node:
            return anew.get(node, node)

        previous = None
        for node, args, kwargs, meta in self._nodes:
            restored = now(node)
            restored.args, restored.kwargs = map_arg(args, now), map_arg(kwargs, now)
            restored.meta.clear()
            restored.meta.update(meta)
            if previous is not None:
                previous.append(restored)
            previous = restored
        # Nothing of the graph reads these any more, but they read one another.
        theirs = {now(node) for node, *_ in self._nodes}
        added = [node for node in graph.nodes if node not in theirs]
        for node in added:
            node.args, node.kwargs = (), {}
        for node in added:
            graph.erase_node(node)
