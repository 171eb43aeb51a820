"""Users as operators name them."""

from __future__ import annotations

import os
import pwd

import pytest

from kvstore.errors import ConfigError
from kvstore.service.users import parse_users


def test_our_own_user_and_root_are_always_there() -> None:
    assert parse_users([], "--memory-user") == {0, os.geteuid()}


def test_names_and_numbers() -> None:
    name = next(entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == 1)
    assert parse_users([name, "54321"], "--memory-user") == {0, os.geteuid(), 1, 54321}


@pytest.mark.parametrize("text", ["", "no such user", "-1", "99999999999", "a\0b"])
def test_nobody_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory-user.*no such user on this host"):
        parse_users([text], "--memory-user")
