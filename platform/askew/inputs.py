"""Text and pixels: the one path from what a shop has to what a tower reads.

Prepare, training, indexing and serving all come through here, so that they cannot differ. Knows
nothing of towers, files or clusters.
"""

import hashlib
import io
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from askew.errors import ArtifactError, DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)
PAD, UNKNOWN = "[PAD]", "[UNK]"


def clean(text: str) -> str:
    """Normalise text: NFKC, control characters out, runs of white space to one space."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


def pixels(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode a photo to (size, size, 3) RGB: upright, alpha over white, whole, padded with white to a square.

    A JPEG is decoded at the smallest scale that is still at least twice `size`, then resized with
    antialiasing. Raises DataError when the bytes are no photo, broken, or of more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as photo:
                return _square(photo, size)
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        found = f"{len(data)} bytes that do not decode ({error})"
        raise DataError(f"a photo ({', '.join(FORMATS)})", found, "mend or drop it") from error


def _square(photo: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = photo.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, more than {MAX_PIXELS:,}")
    photo.draft("RGB", (2 * size, 2 * size))
    upright = ImageOps.exif_transpose(photo)
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, (*WHITE, 255)), upright)
    rgb = upright.convert("RGB")
    return np.asarray(ImageOps.pad(rgb, (size, size), Image.Resampling.BILINEAR, color=WHITE), dtype=np.uint8)


class Tokens:
    """A tokenizer over a fixed vocabulary: texts to padded token ids (0 is padding)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> "Tokens":
        """Learn a lower-cased BPE vocabulary of at most `vocabulary` entries from texts.

        BPE, because the library's WordPiece trainer gives other ids each time, and a run could not resume.
        """
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        words = (pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words))
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """Read `tokenizer.json`. Raises ArtifactError when it is none."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises a bare Exception
            raise ArtifactError(f"a tokenizer in {path}", str(error), "make the model again") from error

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """Read the JSON text of a tokenizer, as `text` gives it."""
        return cls(Tokenizer.from_str(text))

    @property
    def text(self) -> str:
        """The tokenizer as JSON text."""
        return str(self._tokenizer.to_str())

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))

    @property
    def digest(self) -> str:
        """Content hash of the tokenizer, as hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of entries in the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    def ids(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """Encode n texts to (n, L) ids, cut at `length` and padded with 0 to the longest of them (L ≥ 1)."""
        encoded = [e.ids[:length] for e in self._tokenizer.encode_batch_fast(list(texts))]
        table = np.zeros((len(encoded), max([1, *map(len, encoded)])), dtype=np.int64)
        for row, ids in zip(table, encoded, strict=True):
            row[: len(ids)] = ids
        return table
