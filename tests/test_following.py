"""What a stage says, told from what others print, and shown while it runs."""

import io
from contextlib import redirect_stdout

import pytest
from rich.console import Console

from askew import following
from askew.config import RESULT

LOG = [
    "Job submission server address: http://127.0.0.1:8266",
    "\x1b[36m(RayTrainWorker pid=7)\x1b[0m askew: train step 120/1,500 (joint) loss 1.2000",
    "(Map(_telling) pid=8) askew: prepared units 3/8",
    "askew: warning: the overview is not logged: no server",
    RESULT + '{"rows": 3}',
]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (LOG[0], ""),
        (LOG[1], "train step 120/1,500 (joint) loss 1.2000"),
        (LOG[2], "prepared units 3/8"),
        (LOG[4], ""),
    ],
)
def test_what_a_stage_says_is_told_from_what_others_print(line: str, text: str) -> None:
    assert following.said(line) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("train step 120/1,500 (joint)", (120, 1500)),
        ("units 8/8", (8, 8)),
        ("stage train: started", None),
        ("ratio 1.5/2", None),
        ("9/8", None),
        ("0/0", None),
    ],
)
def test_a_count_is_read_where_there_is_one(text: str, count: tuple[int, int] | None) -> None:
    assert following.counted(text) == count


def test_the_result_is_the_last_one_and_may_be_missing() -> None:
    assert following.result([*LOG, RESULT + '{"rows": 4}']) == {"rows": 4}
    assert following.result(LOG[:4]) is None


def test_why_a_stage_failed_is_its_own_word_else_what_was_raised() -> None:
    raised = ["Traceback (most recent call last):", "ValueError: no", "more"]
    assert following.reason([*raised, "askew: error: wanted a; found b; do c"]) == "wanted a; found b; do c"
    assert following.reason(raised) == "ValueError: no"
    assert following.reason(["all is well"]) == ""


def test_what_is_printed_is_handed_on_line_by_line() -> None:
    lines: list[str] = []
    with redirect_stdout(following.Lines(lines.append)):
        print("one", end="")
        print(" line\nanother\nnot en", end="", flush=True)
        assert lines == ["one line", "another"]
        print("ded")
    assert lines == ["one line", "another", "not ended"]


def shown(terminal: bool, plain: bool = True) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120, legacy_windows=False)
    with following.showing(console, "train", plain) as on_line:
        for line in [*LOG, "askew: error: wanted a; found b; do c"]:
            on_line(line)
    return following.ANSI.sub("", written.getvalue())


def test_where_no_terminal_is_each_thing_said_is_a_line() -> None:
    assert shown(terminal=False).splitlines() == [
        "train: train step 120/1,500 (joint) loss 1.2000",
        "train: prepared units 3/8",
        "train: warning: the overview is not logged: no server",
    ]
    assert shown(terminal=False, plain=False) == ""


def test_on_a_terminal_a_bar_moves_and_warnings_stay() -> None:
    found = shown(terminal=True)
    assert "train: warning: the overview is not logged: no server" in found
    assert "train … " in found
    assert "Job submission" not in found
