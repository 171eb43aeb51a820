"""Listens to the load reports of one node, for as long as it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.endpoint import Endpoint
from kvstore.errors import KVStoreError, TransportTimeout
from kvstore.loadreport import LoadReport, ReportTable
from kvstore.messages import Role
from kvstore_client.ctl.connection import ControlConnection, open_connection, reason_text
from kvstore_client.ctl.panels import Node

# A node that comes back is seen within this time.
RETRY_S = 1.0
# A node reports five times a second. After 25 reports that did not come its host has vanished
# without a word, and a new connection may find it again.
SILENCE_S_MAX = 5.0


class Watcher:
    """One endpoint, watched; the loop's thread.

    Args:
        timeout_s: For connecting, and for each answer.
        on_change: Called when the node has come or gone.
        retry_s: From the loss of a connection to the next attempt.

    Attributes:
        heard: Whether the node has reported, or failed to, at least once.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        timeout_s: float,
        on_change: Callable[[], None],
        retry_s: float = RETRY_S,
    ) -> None:
        self.heard = False
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._retry_s = retry_s
        self._reports = ReportTable()
        self._node_id = ""
        self._role: Role | None = None
        self._error = ""

    async def watch(self) -> None:
        """Listen until cancelled; connect again whenever the connection is lost."""
        while True:
            try:
                connection = await open_connection(self._endpoint, self._timeout_s)
                try:
                    raise await self._listen(connection)
                finally:
                    connection.close()
            except KVStoreError as error:
                self._error = reason_text(self._endpoint, error)
            self._change()
            await asyncio.sleep(self._retry_s)

    def node(self, now: float) -> Node:
        """What is known of the node at loop time `now`."""
        return Node(
            endpoint=str(self._endpoint),
            error=self._error,
            node_id=self._node_id,
            role=self._role,
            report=self._reports.report(self._node_id),
            requesters=self._reports.requesters(self._node_id),
            age_s=self._reports.age(now, self._node_id),
            freshness=self._reports.freshness(now, self._node_id),
        )

    async def _listen(self, connection: ControlConnection) -> Exception:
        """Take reports until the connection is lost; why it was."""
        loop = asyncio.get_running_loop()
        self._role = connection.welcome.role
        await connection.subscribe(self._accept)
        while True:
            reason = await connection.end(SILENCE_S_MAX)
            if reason is not None:
                return reason
            silent_s = loop.time() - connection.received_at
            if silent_s > SILENCE_S_MAX:
                return TransportTimeout(f"{self._endpoint}: silent for {silent_s:.1f} s")

    def _accept(self, report: LoadReport) -> None:
        self._reports.accept(asyncio.get_running_loop().time(), report)
        self._node_id = report.node_id
        if self._error or not self.heard:
            self._error = ""
            self._change()

    def _change(self) -> None:
        self.heard = True
        self._on_change()
