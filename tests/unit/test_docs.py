"""What the documents show is what the code has."""

from __future__ import annotations

import inspect
import re
import textwrap

import msgspec
import pytest

import kvstore.layout
import kvstore.protocol
import kvstore.wire
from kvstore.messages import REPLIES, REQUESTS, ErrorCode, FetchOutcome, PutOutcome
from kvstore.wire import FrameType
from tests.support.tree import ROOT

PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()


def pictures(documented: object) -> list[str]:
    """The literal blocks of a docstring."""
    text = inspect.getdoc(documented) or ""
    found = re.findall(r"::\n\n((?: .*\n|\n)+)", text + "\n\n")
    return [textwrap.dedent(block).strip("\n") for block in found]


@pytest.mark.parametrize("documented", [kvstore.wire, kvstore.protocol, kvstore.layout.PieceMap])
def test_the_picture_in_the_docs_is_the_one_in_the_code(documented: object) -> None:
    shown = [
        textwrap.dedent(block).strip("\n") for block in re.findall(r"```\n(.*?)```", PROTOCOL, re.S)
    ]
    (picture, *_) = pictures(documented)
    assert picture in shown


@pytest.mark.parametrize("type", FrameType)
def test_every_frame_type_is_in_the_table(type: FrameType) -> None:
    assert f"| {type.value} | `{type.name}` |" in PROTOCOL


@pytest.mark.parametrize("type", sorted({*REQUESTS.values(), *REPLIES.values()}, key=str))
def test_every_field_is_in_the_table(type: type[msgspec.Struct]) -> None:
    fields = ", ".join(
        f"`{field.encode_name}`" + ("" if field.required else "?")
        for field in msgspec.structs.fields(type)
    )
    assert f"| {fields} |" in PROTOCOL


@pytest.mark.parametrize("outcome", [*FetchOutcome, *PutOutcome])
def test_every_outcome_is_in_a_table(outcome: FetchOutcome | PutOutcome) -> None:
    assert f"| {outcome.value} | `{outcome.name}` |" in PROTOCOL


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_code_is_in_the_table(code: ErrorCode) -> None:
    assert f"| `{code.value}` |" in PROTOCOL


def test_behind_every_fault_in_the_table_is_a_test() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = re.findall(r"\| `(test_\w+)` \|", text)
    assert len(named) > 30
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "fault").glob("*.py"))
    assert [name for name in named if f"def {name}(" not in tests] == []
