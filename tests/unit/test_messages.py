"""Messages: what goes in comes out, and what is out of bounds never gets in."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest

from kvstore import messages
from kvstore.errorcodes import error_to_exception, exception_to_error
from kvstore.errors import (
    Busy,
    Draining,
    KVStoreError,
    LayoutMismatch,
    LimitExceeded,
    LocalProtocolError,
    PermissionDenied,
    RefusedError,
    RemoteProtocolError,
    StoreFull,
    UnknownNamespace,
    Unsupported,
    VersionMismatch,
)
from kvstore.messages import (
    ARRAY_ITEMS_MAX,
    ERROR_TEXT_MAX,
    KEYS_PER_REQUEST_MAX,
    REPLIES,
    REQUESTS,
    Error,
    ErrorCode,
    Limits,
    Pool,
    decode,
    encode,
    unpack,
)
from kvstore.wire import METADATA_BYTES_MAX, FrameType
from tests.support.samples import FROM_CLIENT, FROM_SERVER

ROWS = [
    pytest.param(message, table[type], id=f"{side}-{type.name}")
    for side, table, samples in (
        ("request", REQUESTS, FROM_CLIENT),
        ("reply", REPLIES, FROM_SERVER),
    )
    for type, message in samples.items()
]


def test_every_message_has_a_sample() -> None:
    assert FROM_CLIENT.keys() == REQUESTS.keys()
    assert FROM_SERVER.keys() == REPLIES.keys()
    # Their numbers are taken, so that no build gives them another meaning.
    assert FrameType.__members__.values() - REQUESTS.keys() - REPLIES.keys() == {
        FrameType.SCRUB,
        FrameType.DRAIN,
    }


@pytest.mark.parametrize(("message", "type"), ROWS)
def test_a_message_comes_back_as_it_went(message: Any, type: Any) -> None:
    assert decode(encode(message), type) == message
    assert decode(bytearray(encode(message)), type) == message


@pytest.mark.parametrize(("message", "type"), ROWS)
def test_unknown_fields_are_ignored(message: Any, type: Any) -> None:
    values = unpack(encode(message)) | {"of a newer version": [1, {"deeply": b"nested"}]}
    assert decode(msgpack.packb(values), type) == message


@pytest.mark.parametrize(("message", "type"), ROWS)
def test_a_field_of_a_wrong_type_is_refused(message: Any, type: Any) -> None:
    values = unpack(encode(message))
    for name in values:
        broken = msgpack.packb(values | {name: [None]})
        with pytest.raises(RemoteProtocolError, match=f"^{type.__name__}: "):
            decode(broken, type)


def test_metadata_of_no_bytes_is_a_message_of_defaults() -> None:
    assert decode(b"", messages.Data) == messages.Data()
    with pytest.raises(RemoteProtocolError, match="missing required field"):
        decode(b"", messages.Lookup)


@pytest.mark.parametrize(
    ("type", "change", "at"),
    [
        (FrameType.HELLO, {"session": bytes(15)}, "session"),
        (FrameType.HELLO, {"node_id": ""}, "node_id"),
        (FrameType.HELLO, {"node_id": "n" * 257}, "node_id"),
        (FrameType.HELLO, {"token": "t" * 4097}, "token"),
        (FrameType.HELLO, {"capabilities": ["c"] * 65}, "capabilities"),
        (FrameType.HELLO, {"capabilities": ["c" * 65]}, "capabilities"),
        (FrameType.HELLO, {"role": "king"}, "role"),
        (FrameType.OPEN_NAMESPACE, {"pool": "p" * 129}, "pool"),
        (FrameType.LOOKUP, {"namespaces": []}, "namespaces"),
        (FrameType.LOOKUP, {"namespaces": [bytes(32)] * 257}, "namespaces"),
        (FrameType.LOOKUP, {"namespaces": [bytes(31)]}, "namespaces"),
        (FrameType.LOOKUP, {"keys": []}, "keys"),
        (FrameType.LOOKUP, {"keys": [bytes(15)]}, "keys"),
        (FrameType.LOOKUP, {"keys": [bytes(65)]}, "keys"),
        (FrameType.LOOKUP, {"keys": ["k" * 32]}, "keys"),
        (FrameType.LOOKUP, {"lease_ms": 60_001}, "lease_ms"),
        (FrameType.LOOKUP, {"lease_ms": -1}, "lease_ms"),
        (FrameType.FETCH, {"layer_first": -1}, "layer_first"),
        (FrameType.FETCH, {"layer_last": 0}, "layer_last"),
        (FrameType.FETCH, {"layer_last": 1025}, "layer_last"),
        (FrameType.FETCH, {"group_layers": -1}, "group_layers"),
        (FrameType.FETCH, {"deadline_ms": -1}, "deadline_ms"),
        (FrameType.FETCH, {"deadline_ms": 600_001}, "deadline_ms"),
        (FrameType.FETCH, {"priority": 256}, "priority"),
        (FrameType.PUT, {"ack": "perhaps"}, "ack"),
        (FrameType.RELEASE, {"leases": []}, "leases"),
        (FrameType.RELEASE, {"leases": [1.5]}, "leases"),
        (FrameType.CANCEL, {"request_id": -1}, "request_id"),
        (FrameType.SUBSCRIBE, {"interval_ms": 19}, "interval_ms"),
        (FrameType.POOL, {"capacity_bytes": (1 << 62) + 1}, "capacity_bytes"),
    ],
)
def test_requests_out_of_bounds_are_refused(
    type: FrameType, change: dict[str, Any], at: str
) -> None:
    values = unpack(encode(FROM_CLIENT[type])) | change
    with pytest.raises(RemoteProtocolError, match=rf"\$\.{at}"):
        decode(msgpack.packb(values), REQUESTS[type])


@pytest.mark.parametrize(
    ("type", "change", "at"),
    [
        (FrameType.WANT, {"indices": []}, "indices"),
        (FrameType.WELCOME, {"limits": {"keys_per_request": 0}}, "limits"),
        (FrameType.WELCOME, {"limits": {"metadata_bytes": 1023}}, "limits"),
        (FrameType.OPEN_NAMESPACE, {"namespaces": [{}]}, "namespaces"),
        (FrameType.DONE, {"queued_us": -1}, "queued_us"),
        (FrameType.ERROR, {"code": "whatever"}, "code"),
    ],
)
def test_replies_out_of_bounds_are_refused(
    type: FrameType, change: dict[str, Any], at: str
) -> None:
    values = unpack(encode(FROM_SERVER[type])) | change
    with pytest.raises(RemoteProtocolError, match=rf"\$\.{at}"):
        decode(msgpack.packb(values), REPLIES[type])


def test_the_most_keys_of_the_longest_kind_fit_into_a_frame() -> None:
    keys = [bytes(64)] * KEYS_PER_REQUEST_MAX
    request = messages.Lookup(namespaces=(bytes(32),) * 256, keys=keys)
    assert len(encode(request)) <= METADATA_BYTES_MAX
    assert decode(encode(request), messages.Lookup) == request
    request = msgspec.structs.replace(request, keys=[*keys, bytes(64)])
    with pytest.raises(RemoteProtocolError, match="4097 exceeds"):
        decode(encode(request), messages.Lookup)


@pytest.mark.parametrize(
    "metadata",
    [
        b"\xc1",  # never used
        b"\x81",  # a map of one pair, and nothing follows
        b"\x81\xa1k\x01\x00",  # a byte too many
        b"\x81\x01\x01",  # a number as key
        b"\xa2\xff\xff",  # not UTF-8
        b"\xd4\x05\x00",  # an extension
        b"\xc7\x00\x05",  # an empty extension
        b"\xd6\xff\x00\x00\x00\x01",  # a time
        b"\xdb\xff\xff\xff\xff",  # a string of 4 GiB
        b"\xdf\xff\xff\xff\xff",  # a map of 4 Gi entries
        b"\xdd\xff\xff\xff\xff",  # an array of 4 Gi items
        b"\x91" * 100_000,  # arrays in arrays
        # One more than any message holds, and there is room for it in the metadata.
        b"\xdd" + (ARRAY_ITEMS_MAX + 1).to_bytes(4, "big") + b"\0" * (ARRAY_ITEMS_MAX + 1),
    ],
)
def test_what_is_not_messagepack_is_refused(metadata: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="is not MessagePack"):
        unpack(metadata)


@pytest.mark.parametrize("metadata", [b"\x90", b"\xc0", b"\x05", b"\xa1k", b"\xc4\x01k", b"\xc3"])
def test_what_is_no_map_is_no_message(metadata: bytes) -> None:
    for type in {*REQUESTS.values(), *REPLIES.values()}:
        with pytest.raises(RemoteProtocolError, match="Expected `object`"):
            decode(metadata, type)


def test_text_is_no_way_to_write_bytes() -> None:
    # msgspec would read base64.
    values = {"action": "list", "generation": "QUFB"}
    with pytest.raises(RemoteProtocolError, match="Expected `bytes`, got `str`"):
        decode(msgpack.packb(values), Pool)


def test_limits_are_those_of_both_sides() -> None:
    generous = Limits(
        keys_per_request=1 << 20,
        metadata_bytes=1 << 30,
        in_flight_bytes=1 << 40,
        deadline_ms=1 << 40,
        lease_ms=1 << 40,
    )
    assert generous.within_ours() == Limits(in_flight_bytes=1 << 40)
    strict = Limits(
        keys_per_request=1, metadata_bytes=2000, in_flight_bytes=3, deadline_ms=4, lease_ms=5
    )
    assert strict.within_ours() == strict


ERRORS: list[tuple[KVStoreError, ErrorCode, type[RefusedError]]] = [
    (RemoteProtocolError("text"), ErrorCode.PROTOCOL, RefusedError),
    (LocalProtocolError("text"), ErrorCode.PROTOCOL, RefusedError),
    (StoreFull("text"), ErrorCode.PROTOCOL, RefusedError),
    (VersionMismatch("text"), ErrorCode.VERSION, VersionMismatch),
    (LayoutMismatch("text", "dtype"), ErrorCode.LAYOUT, LayoutMismatch),
    (UnknownNamespace("text"), ErrorCode.NAMESPACE, UnknownNamespace),
    (LimitExceeded("text"), ErrorCode.LIMIT, LimitExceeded),
    (Unsupported("text"), ErrorCode.UNSUPPORTED, Unsupported),
    (PermissionDenied("text"), ErrorCode.PERMISSION, PermissionDenied),
    (Draining("text"), ErrorCode.DRAINING, Draining),
    (Busy("text"), ErrorCode.BUSY, Busy),
    (RefusedError("text"), ErrorCode.REFUSED, RefusedError),
]


def test_every_error_code_stands_for_an_exception() -> None:
    assert {code for _, code, _ in ERRORS} == set(ErrorCode)


@pytest.mark.parametrize(("raised", "code", "received"), ERRORS)
def test_an_error_arrives_as_what_it_means_to_the_caller(
    raised: KVStoreError, code: ErrorCode, received: type[RefusedError]
) -> None:
    error = exception_to_error(raised)
    assert error.code is code
    exception = error_to_exception(decode(encode(error), Error))
    assert type(exception) is received
    assert str(exception) == "text"
    assert getattr(exception, "field", "") == getattr(raised, "field", "")


def test_what_an_error_quotes_is_cut() -> None:
    # A megabyte where a word was expected: the answer has to fit into a frame.
    values = unpack(encode(FROM_CLIENT[FrameType.HELLO])) | {"role": "x" * (METADATA_BYTES_MAX - 9)}
    with pytest.raises(RemoteProtocolError) as caught:
        decode(msgpack.packb(values), messages.Hello)
    assert len(str(caught.value)) == len("Hello: ") + ERROR_TEXT_MAX + 1  # as in our own log
    error = exception_to_error(caught.value)
    assert len(error.message) == ERROR_TEXT_MAX + 1
    assert error.message.startswith("Hello: Invalid enum value 'xxx")
    field = LayoutMismatch("y" * 5000, "dtype")
    assert exception_to_error(field) == Error(
        code=ErrorCode.LAYOUT, message="y" * ERROR_TEXT_MAX + "…", field="dtype"
    )
