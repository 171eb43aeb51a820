"""How traffic is marked, so that hosts and networks can tell what may wait from what may not.

Pure, and of no transport: sockets make `SO_PRIORITY` and the DSCP of the IP header of it, RDMA
a service level and a traffic class. A mark alone moves nothing: whatever queues packets must be
told what it means.
"""

from __future__ import annotations

import msgspec

from kvstore.errors import ConfigError

# More needs CAP_NET_ADMIN: SO_PRIORITY in socket(7).
PRIORITY_MAX = 6
# Six bits of the IP header: RFC 2474, section 3.
DSCP_MAX = 63

# TC_PRIO_BULK of linux/pkt_sched.h. The queues that go by priority without being told
# (pfifo_fast, prio) send it after what has no mark: priomap in tc-prio(8).
BULK_PRIORITY = 2
# Lower effort, RFC 8622: whatever has no mark goes first, and this takes what is left. CS1,
# which the RFC replaces in this role (it updates RFC 4594), is a class selector: where nobody
# has told a device otherwise, a higher one is served no worse than a lower one (RFC 2474,
# section 4.2.2.2), so that switches which take the upper three bits for a queue may send it
# before what has no mark. There, lower effort shares the queue of what has none.
LOWER_EFFORT_DSCP = 1


class Marking(msgspec.Struct, frozen=True):
    """What the packets of a connection carry.

    Attributes:
        priority: Of this host's queues, 0 to 6; see `TC_PRIO_*` of linux/pkt_sched.h.
        dscp: Of the network's queues, 0 to 63.

    Raises:
        ConfigError: One of them is out of its range.
    """

    priority: int
    dscp: int

    def __post_init__(self) -> None:
        for option, value, most in (
            ("priority", self.priority, PRIORITY_MAX),
            ("dscp", self.dscp, DSCP_MAX),
        ):
            if not 0 <= value <= most:
                raise ConfigError(option, value, f"must be a whole number from 0 to {most}")


#: Of what a node sends for other nodes' loads: its own communication goes first.
RELAY_MARKING = Marking(BULK_PRIORITY, LOWER_EFFORT_DSCP)
