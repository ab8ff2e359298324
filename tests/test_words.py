from hypothesis import given
from hypothesis import strategies as st

from askew.words import clean


@given(st.text())
def test_clean_is_settled_after_once(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert "\x00" not in once
    assert once == once.strip()
