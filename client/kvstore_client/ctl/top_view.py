"""What `kvctl top` shows at one moment. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore_client.ctl import panels
from kvstore_client.ctl.panels import Node
from kvstore_client.ctl.tables import clip

KEYS = "s next order, r reverse, q quit"

#: Orders of nodes by name. Figures begin with the largest: that is where to look.
ORDERS: dict[str, Callable[[Node], tuple[float, str]]] = {
    "endpoint": lambda node: (0.0, ""),
    "name": lambda node: (0.0, node.name),
    "queue": lambda node: (-node.queued_bytes, node.name),
    "sent": lambda node: (-node.sent_Bps, node.name),
    "memory": lambda node: (-node.used_bytes / max(1, node.total_bytes), node.name),
    "age": lambda node: (-node.age_s, node.name),
}


class View:
    """How the operator wants to see the nodes.

    Attributes:
        order: One of `ORDERS`; "endpoint" leaves them as they were typed.
        reverse: Whether the order is turned around.
    """

    def __init__(self, order: str = "endpoint", reverse: bool = False) -> None:
        self.order = order
        self.reverse = reverse

    def next_order(self) -> None:
        """Go on to the next of `ORDERS`."""
        names = list(ORDERS)
        self.order = names[(names.index(self.order) + 1) % len(names)]

    def sorted(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes in the chosen order; equal ones as they were typed."""
        ranked = sorted(nodes, key=ORDERS[self.order])
        return ranked[::-1] if self.reverse else ranked

    def lines(self, nodes: Sequence[Node], clock: str) -> list[str]:
        """All there is to see.

        Args:
            clock: The time of day.
        """
        shown = self.sorted(nodes)
        down = sum(bool(node.error) for node in nodes)
        order = self.order + (", reversed" if self.reverse else "")
        title = f"kvctl top  {clock}  nodes: {len(nodes)}, down: {down}  order: {order}"
        sections = [
            [title],
            panels.live_nodes(shown),
            panels.errors(shown),
            panels.links(shown),
            panels.queues(shown),
            panels.disks(shown),
            panels.relays(shown),
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines).split("\n")


def fit(lines: Sequence[str], columns: int, rows: int) -> list[str]:
    """As much of `lines` as a screen has room for; the last line tells of what it has not."""
    kept = list(lines)
    if len(kept) > rows:
        kept = kept[: max(0, rows - 1)]
        kept.append(f"... {len(lines) - len(kept)} more lines: make the window larger")
    return [clip(line, columns) for line in kept[:rows]]
