"""Words: how text is cleaned before anything reads it.

Prepare, training, indexing and serving all come through here, so that they cannot differ. Needs the standard
library alone: the endpoint's client reads queries by it.
"""

import unicodedata


def clean(text: str) -> str:
    """Normalise text: NFKC, control characters out, runs of white space to one space."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())
