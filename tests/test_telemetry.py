"""What goes wrong a thousand times is told once, with its number."""

import logging

import pytest

from askew import telemetry
from askew.telemetry import Warner, log


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is warned of."""
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    log.setLevel(logging.WARNING)
    return caplog


def test_the_same_warning_is_told_once_a_while(heard: pytest.LogCaptureFixture) -> None:
    warner = Warner(every_s=0)
    seldom = Warner(every_s=1000)
    for number in range(3):
        warner.warn("a", f"all {number}")
        seldom.warn("b", f"first {number}", request_id=str(number))
    seldom.warn("c", "another")
    messages = [record.getMessage() for record in heard.records]
    assert messages == [
        "all 0 (1 times)",
        "first 0 (1 times)",
        "all 1 (1 times)",
        "all 2 (1 times)",
        "another (1 times)",
    ]
    seldom._due["b"] = 0
    seldom.warn("b", "again", request_id="9")
    assert heard.records[-1].getMessage() == "again (3 times)"
    assert heard.records[-1].request_id == "9"  # type: ignore[attr-defined]


def test_what_lasts_is_told_ever_more_seldom_and_what_comes_again_at_once(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, told = 1000.0, []
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now)
    warner = Warner(every_s=1, at_least_every_s=8)
    for second in range(40):
        now = 1000.0 + second
        before = len(heard.records)
        warner.warn("down", "it is down")
        told += [second] * (len(heard.records) - before)
    assert told == [0, 1, 3, 7, 15, 23, 31, 39]
    assert heard.records[-1].getMessage() == "it is down (8 times)"
    now = 1100.0
    warner.warn("down", "it is down")
    now = 1101.0
    warner.warn("down", "it is down")
    assert [record.getMessage() for record in heard.records[-2:]] == ["it is down (1 times)"] * 2
