"""Users of this host, as operators name them."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence

from kvstore.errors import ConfigError

# Who may write to a socket may connect to it. Engines share the group of who serves them (Group= of
# the systemd units): files that it makes, which are sockets all, are for user and group alone.
SOCKET_UMASK = 0o117


def parse_users(texts: Sequence[str], option: str) -> frozenset[int]:
    """User ids of names and numbers; our own and root's are always among them.

    Raises:
        ConfigError: There is no such user.
    """
    users = {0, os.geteuid()}
    for text in texts:
        if text.isascii() and text.isdigit() and len(text) <= 10:
            users.add(int(text))
            continue
        try:
            users.add(pwd.getpwnam(text).pw_uid)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                option, text, "no such user on this host; a name or a number (getent passwd)"
            ) from error
    return frozenset(users)


__all__ = ["parse_users"]
