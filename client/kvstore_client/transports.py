"""What moves payload, by the names that users and results call it. Pure."""

from __future__ import annotations

from kvstore.memorymessages import RDMA, SHM

#: The best that a peer offers.
AUTO = "auto"
#: What a user may ask for; see `AsyncClient`.
TRANSPORTS = (AUTO, "tcp", "unix", SHM, RDMA)

__all__ = ["AUTO", "TRANSPORTS"]
