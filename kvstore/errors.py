"""The error tree, grouped by what the caller does next.

    KVStoreError
        ProtocolError
            LocalProtocolError      we were called wrongly: fix the caller
            RemoteProtocolError     the peer broke the protocol: drop the connection
        TransportError              connect, read or write failed: retry, or take the other path
            TransportTimeout        the wait had an end, and it came
        RefusedError                the peer understood and said no: retrying unchanged is useless
            VersionMismatch         no protocol version in common: upgrade the older side
            LayoutMismatch          the pool holds bytes of another layout; names the field
            UnknownNamespace        not opened, or retired: open it (again)
            LimitExceeded           names the limit, its value and what was asked for
            Unsupported             the peer does not do this
            PermissionDenied        credentials or rights are missing
            Draining                the peer is going away: use another one
            Busy                    the peer has no room for it now: go the other way
        StoreError
            StoreFull               nothing evictable: go on without caching
            CorruptBlock            checksum mismatch: treat as a miss, count it
        ConfigError                 names the option, the value and what is allowed

A cache miss is none of these: misses, timeouts and corruption of single blocks are
outcomes (`kvstore.messages.FetchOutcome`, `PutOutcome`), so that one bad block neither
fails nor hides the others. Errors of the operating system are translated where they
happen, with ``raise ... from``.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of every error that this project raises on purpose."""


class ProtocolError(KVStoreError):
    """A rule of the wire protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Raised when our own side asks for something that the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """Raised when the peer sends what the protocol does not allow; the connection is lost."""


class TransportError(KVStoreError):
    """Raised when a connection cannot be made, or breaks."""


class TransportTimeout(TransportError):
    """Raised when a peer did not answer within the time it had."""


class RefusedError(KVStoreError):
    """Raised when the peer answered a well-formed request with a refusal."""


class VersionMismatch(RefusedError):
    """Raised when the version windows of two peers do not overlap."""


class LayoutMismatch(RefusedError):
    """Raised when a pool is pinned to a generation with another layout.

    Attributes:
        field: Name of the first layout field that differs.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownNamespace(RefusedError):
    """Raised when a request names a namespace that the peer has not opened."""


class LimitExceeded(RefusedError):
    """Raised when a request is larger than a named limit."""


class Unsupported(RefusedError):
    """Raised when the peer does not implement what was asked for."""


class PermissionDenied(RefusedError):
    """Raised when authentication fails or a right on the pool is missing."""


class Draining(RefusedError):
    """Raised when the peer takes no new requests because it is shutting down."""


class Busy(RefusedError):
    """Raised when the peer has no buffers left, or wants no work for others at present."""


class StoreError(KVStoreError):
    """A storage engine could not do what was asked for."""


class StoreFull(StoreError):
    """Raised when no space can be freed: what is left is leased, pinned or being written."""


class CorruptBlock(StoreError):
    """Raised when the bytes of a block do not match its checksums."""


class ConfigError(KVStoreError):
    """Raised when an option has a value that is not allowed.

    Attributes:
        option: Name of the option as the operator typed it.
        value: The offending value.
        remedy: What is allowed, as a phrase that finishes the sentence.
    """

    def __init__(self, option: str, value: object, remedy: str) -> None:
        super().__init__(f"{option}={value}: {remedy}")
        self.option = option
        self.value = value
        self.remedy = remedy
