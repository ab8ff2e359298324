"""Tokens and pixels: the one path from what a shop has to what a tower reads.

Prepare, training, indexing and serving all come through here, so that they cannot differ. Knows
nothing of towers, files or clusters.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import interpolate
from transformers import AutoTokenizer

from askew.errors import ArtifactError, ConfigError, DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
MAX_PIXELS = 50_000_000
TRANSFORM = 1  # counted up whenever a photo would come out of `pixels` otherwise
SPARE = 1.3  # at less, what is left for the antialiased resize is too little to come out like the full decode
WHITE = 255
PAD, UNKNOWN = "[PAD]", "[UNK]"
PADDING = -1  # a place of a row of token ids that holds none


def pixels(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode a photo to (size, size, 3) RGB: upright, alpha over white, whole, padded with white to a square.

    Of an animation the first frame counts. A JPEG is decoded at the smallest scale that leaves SPARE times the
    pixels a side that are wanted, then resized with antialiasing; integer arithmetic throughout, so that every
    machine gives the same bytes. Raises DataError, of which `problem` tells the reason: empty, not_a_photo,
    truncated, too_many_pixels (told by the header, before decoding) or broken.
    """
    assert size > 0
    if not data:
        raise _refusal("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd metadata, and on sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as photo:
                return _square(data, photo, size)
    except DataError:
        raise
    except Exception as error:  # broken files make decoders raise whatever they stumble over
        raise _refusal(_reason(data, error), _detail(data, error)) from error


def photo_size(data: bytes) -> tuple[int, int]:
    """Read a photo's width and height from its header."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as photo:
        return photo.size


def problem(error: DataError) -> str:
    """Tell why `pixels` refused a photo, as a short code that stays the same over versions."""
    return error.found.partition(":")[0]


def _refusal(reason: str, detail: str) -> DataError:
    return DataError(f"a photo ({', '.join(FORMATS)})", f"{reason}: {detail}", "mend or drop it")


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    signed = data.startswith(SIGNATURES) or data[8:12] == b"WEBP" or data[4:10] == b"ftypav"
    if isinstance(error, UnidentifiedImageError) and not signed:
        return "not_a_photo"
    said = any(words in str(error).lower() for words in ("truncated", "premature end"))
    return "truncated" if said or len(data) < _declared_length(data) else "broken"


def _detail(data: bytes, error: Exception) -> str:
    """Describe in words that are the same each time: Pillow's message on an unknown file holds an address."""
    if isinstance(error, UnidentifiedImageError):
        return f"{len(data):,} bytes that begin with {data[:16]!r}"
    return f"{len(data):,} bytes that do not decode ({error})"


def _declared_length(data: bytes) -> int:
    """Read how long a WebP (RIFF) or an AVIF (a chain of ISO boxes) says it is, in bytes; 0 for other formats."""
    if data[8:12] == b"WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    end = 0
    while data[4:10] == b"ftypav" and end < len(data):
        length = int.from_bytes(data[end : end + 4])
        end += max(length, 8)
    return end


def _square(data: bytes, photo: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = photo.size
    if width * height > MAX_PIXELS:
        raise _refusal("too_many_pixels", f"{width:,} × {height:,} pixels, more than {MAX_PIXELS:,}")
    eighths = 8
    if photo.format in ("JPEG", "MPO"):  # the second: several photos in one file, the first of them is read
        eighths = min(8, math.ceil(8 * SPARE * size / max(width, height)))
        rgb = _jpeg(data, photo, eighths)
    else:
        rgb = np.array(_rgb(photo))
    fitted = [max(1, round(side * size / max(width, height))) for side in (height, width)]
    scales = [side / (whole * eighths / 8) for side, whole in zip(fitted, (height, width), strict=True)]
    small = _turned(_resized(rgb, scales), _orientation(photo))
    square = np.full((size, size, 3), WHITE, dtype=np.uint8)
    top, left = (round((size - side) / 2) for side in small.shape[:2])
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _resized(rgb: NDArray[np.uint8], scales: Sequence[float]) -> NDArray[np.uint8]:
    """Resize (h, w, 3) by the scales of height and width, with antialiasing, by torch's integer kernel.

    Scales, not sizes: a scaled decode rounds up, and its last row and column may lie beyond the photo.
    """
    photo = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)
    up = [scale * (1 + 1e-9) for scale in scales]  # so that the size, which is rounded down, is the one meant
    small = interpolate(photo, scale_factor=up, mode="bilinear", antialias=True)[0]
    return small.permute(1, 2, 0).numpy()


def _jpeg(data: bytes, photo: Image.Image, eighths: int) -> NDArray[np.uint8]:
    """Decode a JPEG at eighths/8 of its size to RGB. The decoder refuses what it would have to guess at."""
    least = [0, 0] if eighths == 8 else [math.ceil(side * eighths / 8) for side in photo.size]
    space = "CMYK" if photo.mode == "CMYK" else "RGB"
    colours: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, space, min_width=least[0], min_height=least[1])
    if space == "CMYK":  # stored inverted, as Adobe does: 255 is no ink
        light = colours.astype(np.uint16)
        colours = ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)
    return colours


def _rgb(photo: Image.Image) -> Image.Image:
    """Decode any other photo to RGB; 16 bits become 8, and what is transparent lies over white."""
    if photo.mode.startswith("I"):  # 16-bit grey: 0 to 65,535, which is 257 times 0 to 255
        grey = (np.asarray(photo).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def _orientation(photo: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; a photo with none or with broken EXIF is taken as upright (1)."""
    try:
        found = photo.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as above
        found = None
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(photo: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn (h, w, 3) upright: orientations 5 to 8 are 1 to 4 with rows and columns exchanged first."""
    if orientation > 4:
        photo = photo.swapaxes(0, 1)
    down, right = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return photo[::down, ::right]


class Tokens:
    """A tokenizer over a fixed vocabulary: texts to rows of token ids."""

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
    def of_checkpoint(cls, checkpoint: str) -> "Tokens":
        """Take the tokenizer of a checkpoint of transformers. Raises ConfigError when there is none."""
        try:
            found = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
            tokenizer = getattr(found, "backend_tokenizer", None)
        except (OSError, ValueError) as error:
            told = str(error).splitlines()[0]
            raise ConfigError(f"a tokenizer at {checkpoint}", told, "check its path or name") from error
        if tokenizer is None:
            raise ConfigError(
                f"a tokenizer.json at {checkpoint}", "another tokenizer", "convert it, or choose another"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
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
        self._tokenizer.no_truncation()
        return str(self._tokenizer.to_str())

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.text, encoding="utf-8")

    @property
    def digest(self) -> str:
        """Content hash of the tokenizer, as hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of entries in the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    def ids(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """Encode n texts to (n, L) ids, cut at `length` and filled with PADDING to the longest of them (L ≥ 1).

        A text that is cut keeps the marks that its tokenizer sets at both ends.
        """
        if (self._tokenizer.truncation or {}).get("max_length") != length:
            self._tokenizer.enable_truncation(length)
        encoded = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]
        table = np.full((len(encoded), max([1, *map(len, encoded)])), PADDING, dtype=np.int64)
        for row, ids in zip(table, encoded, strict=True):
            row[: len(ids)] = ids
        return table
