"""A body whose end HTTP does not mark: its content tells whether it is whole."""

import itertools
import json

import pytest

from tornado_fal_proxy.upstream.completeness import completeness_for

TEXTS = [
    {"a": [1, {"b": 'x"y{[\\', "c": "\\\\"}], "d": "}]", "": None},
    [],
    {},
    [[["]"]]],
    {"images": [{"url": "data:image/png;base64,AAAA"}]},
    '"a string',
]


@pytest.mark.parametrize(("text", "step"), itertools.product(map(json.dumps, TEXTS), [1, 2, 3, 7, 1000]))
def test_json_is_whole_only_at_its_end(text: str, step: int) -> None:
    """However it is cut into pieces, no beginning of a JSON object, list or string is taken for whole."""
    data = text.encode()
    for end in range(1, len(data) + 1):
        follower = completeness_for("application/json")
        assert follower is not None
        for start in range(0, end, step):
            follower.feed(data[start : min(start + step, end)])
        assert follower.is_complete is (end == len(data))


@pytest.mark.parametrize("text", [b"", b"1", b"-12.5e3", b" true\n", b"null", b" \n", b"{} \n", b"not found"])
def test_json_that_may_end(text: bytes) -> None:
    """An empty text, a number behind a digit, a whole word and what is no JSON may end, and white space may follow."""
    follower = completeness_for("Application/JSON; charset=utf-8")
    assert follower is not None
    follower.feed(text)
    assert follower.is_complete


@pytest.mark.parametrize(
    ("text", "step"), itertools.product(["true", "false", "null", " -", "1.", "2E", "-1.5e+"], [1, 9])
)
def test_a_word_of_json_is_whole_only_at_its_end(text: str, step: int) -> None:
    """No beginning of a word is taken for whole, and no number without the digit that must follow."""
    data = text.encode()
    for end in range(2, len(data) + 1):
        follower = completeness_for("application/json")
        assert follower is not None
        for start in range(0, end, step):
            follower.feed(data[start : min(start + step, end)])
        assert follower.is_complete is (data[:end] in (b"true", b"false", b"null", b"-1", b"-1.5"))


EVENTS: list[tuple[list[bytes], bool]] = [
    ([], True),
    ([b"data: 1\n\n"], True),
    ([b"data: 1\r\n\r\n"], True),
    ([b"data: 1\r\r"], True),
    ([b"data: 1\n"], False),
    ([b"data: 1\n", b"\n"], True),
    ([b"data: 1\r\n", b"\r\n"], True),
    ([b"data: 1\r", b"\n\r", b"\n"], True),
    ([b"data: 1\n\r\n"], True),
    ([b"data: 1\r\n\n"], True),
    ([b"data: 1\r\n\r"], True),
    ([b"data: 1\r\n"], False),
    ([b"data: " + b"x" * 10_000 + b"\r", b"\n", b"\r"], True),
    ([b"data: 1\n\ndata"], False),
    ([b"data: 1\n\n: ping\n"], True),
    ([b"data: 1\n\n: pi"], True),
    ([b": ping\ndata: 1"], False),
    ([b"data: 1\n\n", b"event: x\n"], False),
    ([b"data: " + b"x" * 10_000], False),
    ([b"data: " + b"x" * 10_000, b"\n", b"\n"], True),
    ([b": " + b"x" * 10_000, b"\n", b"data: 1\n"], False),
    ([b"\n\n\n"], True),
]


@pytest.mark.parametrize(("pieces", "complete"), EVENTS)
def test_an_event_stream_ends_behind_an_empty_line(pieces: list[bytes], complete: bool) -> None:
    """An event that has begun must end with an empty line, and a comment need not."""
    follower = completeness_for("text/event-stream; charset=utf-8")
    assert follower is not None
    for piece in pieces:
        follower.feed(piece)
    assert follower.is_complete is complete


@pytest.mark.parametrize("kind", ["application/problem+json", "application/vnd.fal.v1+json"])
def test_types_of_json(kind: str) -> None:
    """Every kind of JSON is followed."""
    assert completeness_for(kind) is not None


@pytest.mark.parametrize("kind", ["", "text/html", "image/png", "application/jsonl", "application/x-ndjson", "x/json"])
def test_other_types_tell_no_end(kind: str) -> None:
    """A body of another type is taken for whole, because its content does not tell."""
    assert completeness_for(kind) is None
