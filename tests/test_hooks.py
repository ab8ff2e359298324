"""Whether a request comes from MLflow: its own signature is the oracle, in the endpoint's tests too."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.webhooks import delivery

from askew import hooks

HEADERS = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)


def signed(secret: str, body: str, at: int) -> dict[str, str]:
    signature = delivery._generate_hmac_signature(secret, "id", str(at), body)
    return {hooks.ID: "id", hooks.AT: str(at), hooks.SIGNATURE: signature}


def test_what_mlflow_signed_lately_with_the_secret_is_its_own() -> None:
    now = int(time.time())
    assert hooks.authentic("s", signed("s", '{"é": 1}', now), '{"é": 1}'.encode())
    assert not hooks.authentic("s", signed("t", "{}", now), b"{}")
    assert not hooks.authentic("s", signed("s", "{}", now), b"{} ")
    assert not hooks.authentic("s", signed("s", "{}", now) | {hooks.ID: "other"}, b"{}")
    for away in (-hooks.OLD_S - 2, hooks.OLD_S + 2):
        assert not hooks.authentic("s", signed("s", "{}", now + away), b"{}")


def test_without_a_secret_nothing_is() -> None:
    assert not hooks.authentic("", signed("", "{}", int(time.time())), b"{}")


@pytest.mark.parametrize("missing", [hooks.AT, hooks.SIGNATURE])
def test_without_a_header_it_is_not(missing: str) -> None:
    headers = signed("s", "{}", int(time.time()))
    assert not hooks.authentic("s", {name: value for name, value in headers.items() if name != missing}, b"{}")


@given(HEADERS, HEADERS, HEADERS, st.binary(max_size=40))
def test_whatever_else_comes_is_not(ident: str, at: str, signature: str, body: bytes) -> None:
    assert not hooks.authentic("s", {hooks.ID: ident, hooks.AT: at, hooks.SIGNATURE: signature}, body)
