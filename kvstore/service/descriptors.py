"""The limit of descriptors: each connection is one."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

# Descriptors beside those of connections: listeners, the arena, epoll, standard streams.
DESCRIPTORS_BESIDE = 64


def raise_descriptor_limit(count: int) -> None:
    """See to it that the process may have `count` descriptors, as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        logger.warning(
            "%d descriptors are allowed (ulimit -n), %d are needed for all connections",
            wanted,
            count,
        )
