"""Errors as they travel: which code stands for which exception."""

from __future__ import annotations

from kvstore.errors import (
    Busy,
    Draining,
    LayoutMismatch,
    LimitExceeded,
    PermissionDenied,
    RefusedError,
    UnknownNamespace,
    Unsupported,
    VersionMismatch,
)
from kvstore.messages import Error, ErrorCode, cut_text

_ERROR_CLASSES: dict[ErrorCode, type[RefusedError]] = {
    ErrorCode.VERSION: VersionMismatch,
    ErrorCode.NAMESPACE: UnknownNamespace,
    ErrorCode.LIMIT: LimitExceeded,
    ErrorCode.UNSUPPORTED: Unsupported,
    ErrorCode.PERMISSION: PermissionDenied,
    ErrorCode.DRAINING: Draining,
    ErrorCode.BUSY: Busy,
}
_ERROR_CODES = {cls: code for code, cls in _ERROR_CLASSES.items()}


def error_to_exception(error: Error) -> RefusedError:
    """The exception that stands for an ERROR frame on the side that receives it."""
    if error.code is ErrorCode.LAYOUT:
        return LayoutMismatch(error.message, error.field)
    return _ERROR_CLASSES.get(error.code, RefusedError)(error.message)


def exception_to_error(exception: Exception) -> Error:
    """The ERROR frame that stands for an exception on the side that refuses."""
    message = cut_text(str(exception))
    if isinstance(exception, LayoutMismatch):
        return Error(code=ErrorCode.LAYOUT, message=message, field=exception.field)
    for cls, code in _ERROR_CODES.items():
        if isinstance(exception, cls):
            return Error(code=code, message=message)
    code = ErrorCode.REFUSED if isinstance(exception, RefusedError) else ErrorCode.PROTOCOL
    return Error(code=code, message=message)
