"""What a process asks of the system and of its interpreter before it serves."""

from __future__ import annotations

import gc
import resource

import pytest

from kvstore.service.descriptors import raise_descriptor_limit
from kvstore.service.garbage import settle_garbage


def test_the_limit_of_descriptors_is_raised_as_far_as_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_descriptor_limit(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
        raise_descriptor_limit(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert not caplog.messages
        if hard != resource.RLIM_INFINITY:
            raise_descriptor_limit(hard + 1)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
            assert f"{hard} descriptors are allowed" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert soft <= hard or hard == resource.RLIM_INFINITY


def test_what_a_start_made_is_kept_out_of_garbage_collection() -> None:
    gc.unfreeze()
    try:
        settle_garbage()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
