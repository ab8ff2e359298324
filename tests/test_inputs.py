import io
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from askew import inputs
from askew.errors import ArtifactError, DataError

RED, SIDE = (200, 30, 40), 48


def encoded(photo: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    photo.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_a_photo_is_padded_with_white_to_a_square(kind: str) -> None:
    square = inputs.pixels(encoded(Image.new("RGB", (60, 120), RED), kind), SIDE)
    assert square.shape == (SIDE, SIDE, 3)
    assert np.abs(square[:, 12:36].astype(int) - RED).max() < 8
    assert square[:, :10].min() > 240


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "LA", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    photo = Image.new(mode, (64, 64))
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert inputs.pixels(encoded(photo, kind), SIDE).shape == (SIDE, SIDE, 3)


def test_alpha_lies_over_white() -> None:
    assert inputs.pixels(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "PNG"), SIDE).min() == 255


def test_exif_orientation_is_applied() -> None:
    photo = Image.new("RGB", (64, 64), "white")
    photo.paste(RED, (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    square = inputs.pixels(encoded(photo, "JPEG", exif=exif), SIDE)
    assert np.abs(square[-10:].astype(int) - RED).max() < 20
    assert square[:10].min() > 235


def test_scaled_decoding_stays_true_to_the_full_decode() -> None:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((768, 768))
    data = encoded(coarse, "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - full).mean() < 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600],
        b"%!PS-Adobe-3.0 EPSF",
    ],
    ids=["empty", "html", "truncated", "postscript"],
)
def test_what_is_no_photo_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="photo"):
        inputs.pixels(data, SIDE)


def test_a_bomb_is_refused_unopened() -> None:
    with pytest.raises(DataError, match="pixels"):
        inputs.pixels(encoded(Image.new("1", (9000, 9000)), "PNG"), SIDE)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(DataError):
        inputs.pixels(data, 8)


@given(st.text())
def test_clean_is_settled_after_once(text: str) -> None:
    once = inputs.clean(text)
    assert inputs.clean(once) == once
    assert "\x00" not in once
    assert once == once.strip()


def test_tokens_pad_cut_and_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokens = inputs.Tokens.train(["red striped mug", "blue mug", "red cushion"], 200)
    alone = tokens.ids(["red mug"], 4)
    ids = tokens.ids(["Red mug", "", "red red red red red"], 4)
    assert ids.shape == (3, 4)
    assert (ids[1] == 0).all()
    assert ids[0].tolist() == alone[0].tolist() + [0] * (4 - alone.shape[1])
    tokens.save(tmp_path / "tokenizer.json")
    again = inputs.Tokens.load(tmp_path / "tokenizer.json")
    assert (again.ids(["blue mug"], 4) == tokens.ids(["blue mug"], 4)).all()
    assert again.digest == tokens.digest == inputs.Tokens.parse(tokens.text).digest


def test_a_vocabulary_is_the_same_in_every_process() -> None:
    script = (
        "from askew.inputs import Tokens\n"
        "words = [f'{a}{b} {b}{a}' for a in ('red', 'blue', 'mug') for b in ('ish', 'let', 'ware', 'ing')]\n"
        "print(Tokens.train(words, 60).digest)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    digests = {subprocess.check_output(command, env=environment, text=True) for _ in range(4)}
    assert len(digests) == 1


def test_a_broken_tokenizer_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="tokenizer"):
        inputs.Tokens.load(tmp_path / "tokenizer.json")
