import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from askew import inputs
from askew.errors import ArtifactError, DataError
from askew.words import clean

RED, SIDE = (200, 30, 40), 48
KINDS = ["JPEG", "PNG", "WEBP", "GIF", "AVIF"]


def encoded(photo: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    photo.save(stream, kind, **options)
    return stream.getvalue()


SMALL = {kind: encoded(Image.effect_noise((24, 16), 50), kind) for kind in KINDS}


def texture(width: int, height: int, seed: int = 0) -> Image.Image:
    """What photos are like to a decoder: amplitudes that fall with frequency (1/f), and hard-edged shapes."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(random.normal(size=(3, height, width))) / frequency**1.2
    planes = np.fft.irfft2(noise, (height, width))
    planes = 128 + 40 * (planes[:1] + 0.3 * planes) / planes.std()
    photo = Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    for left, top, side in random.integers(0, min(width, height), (12, 3)).tolist():
        photo.paste(
            tuple(random.integers(0, 255, 3).tolist()), (left, top, left + side // 6 + 1, top + side // 4 + 1)
        )
    return photo


def whole(photo: Image.Image, size: int) -> np.ndarray:
    """The plain way: everything decoded, then resized and padded."""
    resample = Image.Resampling.BILINEAR
    return np.asarray(ImageOps.pad(photo.convert("RGB"), (size, size), resample, color=(255, 255, 255)))


def png(rows: np.ndarray, colour_type: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of what Pillow does not write: 16-bit colours, other chunks, sizes that are not there."""
    height, width = rows.shape[:2]
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(width, height, colour_type, bits, *chunks, (b"IDAT", zlib.compress(lines)))


def png_of(width: int, height: int, colour_type: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def reason(data: bytes, size: int = SIDE) -> str:
    with pytest.raises(DataError, match="photo") as caught:
        inputs.pixels(data, size)
    assert " at 0x" not in str(caught.value)  # the same words each time
    return inputs.problem(caught.value)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
@pytest.mark.parametrize("shape", [(90, 60), (500, 301)])
def test_what_is_no_jpeg_comes_out_as_by_the_plain_way(kind: str, mode: str, shape: tuple[int, int]) -> None:
    photo = texture(*shape).convert(mode)
    data = encoded(photo, kind, lossless=True)
    difference = inputs.pixels(data, SIDE).astype(int) - whole(Image.open(io.BytesIO(data)), SIDE)
    assert np.abs(difference).max() <= 1  # two integer kernels


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"keep_rgb": True}, {"subsampling": 0}, {"quality": 30}]
)
def test_every_make_of_jpeg_is_read(options: dict[str, object]) -> None:
    data = encoded(texture(300, 200), "JPEG", **options)
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - whole(Image.open(io.BytesIO(data)), SIDE)).mean() < 2


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
@pytest.mark.parametrize("colour", [RED, (255, 255, 255), (0, 0, 0), (20, 90, 250)])
def test_inks_become_colours(kind: str, colour: tuple[int, int, int]) -> None:
    inks = Image.new("RGB", (200, 200), colour).convert("CMYK")
    inverted = np.ascontiguousarray(255 - np.asarray(inks))  # as Adobe stores them
    data = encoded(inks, "JPEG") if kind == "CMYK" else simplejpeg.encode_jpeg(inverted, 95, "CMYK", "420")
    assert simplejpeg.decode_jpeg_header(data)[2] == kind
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - colour).max() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_alpha_lies_over_white(mode: str, kind: str) -> None:
    black = Image.new(mode, (64, 64))
    assert inputs.pixels(encoded(black, kind), SIDE).min() > 250
    black.putalpha(128)
    assert np.abs(inputs.pixels(encoded(black, kind), SIDE).astype(int) - 127).max() < 5


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind: str) -> None:
    photo = Image.new("P", (64, 64), 1)
    photo.putpalette([0, 0, 0, *RED])
    photo.paste(0, (0, 0, 64, 32))
    assert inputs.pixels(encoded(photo, kind), SIDE)[:20].max() == 0
    square = inputs.pixels(encoded(photo, kind, transparency=0), SIDE)
    assert square[:20].min() == 255
    assert (square[30:] == RED).all()


def test_a_palette_with_alpha_lies_over_white() -> None:
    photo = Image.new("P", (64, 64), 1)
    photo.putpalette([0, 0, 0, 0, 0, 0])
    half = inputs.pixels(encoded(photo, "PNG", transparency=bytes([255, 128])), SIDE)
    assert np.abs(half.astype(int) - 127).max() < 3


@pytest.mark.parametrize(
    ("colour_type", "num_bands"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"]
)
@pytest.mark.parametrize("value", [0, 257 * 100, 257 * 200, 65535])
def test_sixteen_bits_are_scaled_to_eight(colour_type: int, num_bands: int, value: int) -> None:
    rows = np.full((20, 20, num_bands), value, dtype=">u2")
    if num_bands in (2, 4):
        rows[..., -1] = 65535
    assert (inputs.pixels(png(rows, colour_type, 16), SIDE) == value // 257).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - RED).max() < 12


def test_of_several_photos_in_one_jpeg_the_first_counts() -> None:
    data = encoded(
        Image.new("RGB", (64, 64), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]
    )
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - RED).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (400, 300)])
def test_exif_orientation_is_applied(orientation: int, kind: str, shape: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(texture(*shape), kind, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.abs(inputs.pixels(data, SIDE).astype(int) - whole(upright, SIDE)).mean() < 2


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01", b"no"]
)
def test_a_photo_with_broken_exif_is_taken_as_upright(exif: bytes) -> None:
    photo = texture(64, 64)
    assert (
        inputs.pixels(encoded(photo, "JPEG", exif=exif), SIDE) == inputs.pixels(encoded(photo, "JPEG"), SIDE)
    ).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (10_000, 1), (1, 10_000), (3, 2), (47, 49)])
def test_every_shape_fits(kind: str, shape: tuple[int, int]) -> None:
    square = inputs.pixels(encoded(Image.new("RGB", shape, RED), kind), SIDE).astype(int)
    assert np.abs(square[SIDE // 2 - 1 : SIDE // 2 + 1].reshape(-1, 3) - RED).max(axis=-1).min() < 12
    assert square.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(("side", "size"), [(94, 48), (147, 48), (173, 48), (376, 48)])
def test_a_square_photo_leaves_no_edge(side: int, size: int) -> None:
    """Not even where size / side × side is less than size, in floating-point numbers."""
    square = inputs.pixels(encoded(Image.new("RGB", (side, side), RED), "PNG"), size)
    assert (square == RED).all()


@pytest.mark.parametrize("size", [48, 128, 224])
@pytest.mark.parametrize(
    "shape", [(800, 800), (500, 500), (501, 333), (300, 900), (449, 448), (240, 200), (1600, 400), (63, 40)]
)
def test_scaled_decoding_stays_true_to_the_full_decode(shape: tuple[int, int], size: int) -> None:
    data = encoded(texture(*shape), "JPEG", quality=85)
    found, wanted = (
        inputs.pixels(data, size).astype(float),
        whole(Image.open(io.BytesIO(data)), size).astype(float),
    )
    assert np.abs(found - wanted).mean() < 2
    assert (found * wanted).sum() / np.sqrt((found**2).sum() * (wanted**2).sum()) > 0.999


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not_a_photo"),
        (b"not found", "not_a_photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_a_photo"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_a_photo"),
        (b"\0" * 1000, "not_a_photo"),
        (encoded(Image.new("RGB", (9, 9)), "BMP"), "not_a_photo"),
        (b"\xff\xd8\xff\xe0\0\x02\xff\xd9", "broken"),
        (encoded(texture(64, 64), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "broken"),
        (png_of(9, 9, 2, 8, (b"IDAT", b"no zlib")), "broken"),
    ],
    ids=["empty", "html", "text", "eps", "svg", "zeros", "bmp", "no frame", "12 bits", "no zlib"],
)
def test_what_is_no_photo_is_refused(data: bytes, wanted: str) -> None:
    assert reason(data) == wanted


@pytest.mark.parametrize("kind", [*KINDS, "progressive"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_photo_is_refused(kind: str, part: float) -> None:
    progressive = kind == "progressive"
    data = encoded(
        texture(160, 120), "JPEG" if progressive else kind, **({"progressive": True} if progressive else {})
    )
    assert reason(data[: int(part * len(data))]) == "truncated"


def test_a_truncated_jpeg_that_was_ended_again_is_refused() -> None:
    data = encoded(texture(160, 120), "JPEG")
    assert reason(data[: len(data) // 2] + b"\xff\xd9") == "truncated"


def test_a_jpeg_with_more_behind_its_end_is_read() -> None:
    data = encoded(texture(160, 120), "JPEG")
    assert (inputs.pixels(data + b"more", SIDE) == inputs.pixels(data, SIDE)).all()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("1", (9000, 9000)), "PNG"),
        encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        png_of(50_000, 50_000, 2, 8, (b"IDAT", zlib.compress(b""))),
        encoded(Image.new("L", (8, 8)), "JPEG").replace(b"\x08\0\x08\0\x08", b"\x08\xff\xdc\xff\xdc"),
        b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + encoded(Image.new("P", (8, 8)), "GIF")[10:],
    ],
    ids=["81 million", "144 million", "2,500 million", "jpeg", "gif"],
)
def test_a_bomb_is_refused_unopened(data: bytes) -> None:
    start = time.process_time()
    assert reason(data) == "too_many_pixels"
    assert time.process_time() - start < 0.1


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(DataError):
        inputs.pixels(data, 8)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)
)
def test_damage_is_refused_or_gives_a_square(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(SMALL[kind])
    for place, byte in changes:
        data[int(place * len(data))] = byte
    try:
        square = inputs.pixels(bytes(data), 8)
    except DataError as error:
        found = inputs.problem(error)
    else:
        found = "none" if square.shape == (8, 8, 3) else "no square"
    assert found in ("none", "not_a_photo", "truncated", "too_many_pixels", "broken")


def test_tokens_pad_cut_and_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokens = inputs.Tokens.train(["red striped mug", "blue mug", "red cushion"], 200)
    alone = tokens.ids(["red mug"], 4)
    ids = tokens.ids(["Red mug", "", "red red red red red"], 4)
    assert ids.shape == (3, 4)
    assert (ids[1] == inputs.PADDING).all()
    assert ids[0].tolist() == alone[0].tolist() + [inputs.PADDING] * (4 - alone.shape[1])
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


ODD = [
    "👩‍👩‍👧‍👦" * 60,
    "e" + "\u0301" * 511,
    "\u202e" * 512,
    "\u200d" * 512,
    "ﷺ" * 512,
    "a\r\nb\x1b[31m",
    "😀" * 512,
]


@pytest.mark.parametrize(
    "text", ODD, ids=["family", "combining", "right to left", "joiners", "long", "lines", "faces"]
)
def test_odd_text_is_tokens_in_no_time(text: str) -> None:
    tokens = inputs.Tokens.train(["red striped mug", "blue mug"], 100)
    started = time.process_time()
    ids = tokens.ids([clean(text)], 16)
    assert ids.shape[1] <= 16
    assert (ids < tokens.size).all()
    assert time.process_time() - started < 0.5


def test_a_broken_tokenizer_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="tokenizer"):
        inputs.Tokens.load(tmp_path / "tokenizer.json")
