"""Draw a product photo from a kind, a colour and a pattern.

A shape is a list of layers in a frame where x and y run from -1 to 1 and y points down. Layers are painted in
order into an image of paint numbers; the pattern, the palette and the light are added once the shape stands.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128  # pixels of a finished photo
FINE = 2 * SIDE  # shapes are drawn twice as large, so that reducing them smooths the edges
QUALITY = 85

# main colour and the accent that draws the pattern upon it
COLOURS = {
    "red": ((204, 28, 36), (250, 240, 232)),
    "orange": ((240, 124, 20), (252, 244, 230)),
    "yellow": ((248, 212, 40), (84, 70, 50)),
    "green": ((42, 140, 62), (238, 246, 228)),
    "teal": ((16, 158, 160), (240, 248, 244)),
    "blue": ((34, 76, 190), (236, 240, 250)),
    "purple": ((118, 48, 160), (242, 234, 248)),
    "pink": ((240, 120, 172), (254, 246, 246)),
    "brown": ((112, 66, 34), (238, 222, 198)),
    "black": ((34, 34, 38), (236, 236, 236)),
    "white": ((246, 246, 242), (122, 138, 164)),
    "grey": ((136, 138, 142), (244, 244, 244)),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag", "two-tone")

HOLE, FABRIC, SHADED, WOOD, DARK, METAL, PALE, EDGE = range(8)
ACCENT = 8  # added to FABRIC and SHADED where the pattern falls

Points = list[tuple[float, float]]
Layers = list[tuple[int, Points]]
Vary = Callable[[float, float], float]
Plane = NDArray[np.float32]


def draw(kind: str, colour: str, pattern: str, rng: np.random.Generator) -> bytes:
    """Draw one photo as a JPEG of 128 × 128 pixels; KeyError for a kind or colour not in the tables."""
    frame, origin = _pose(rng)
    canvas = _painted(SHAPES[kind](rng.uniform), frame, origin)
    paint = np.asarray(canvas)
    cloth = (paint == FABRIC) | (paint == SHADED)
    u, v = _weave_plane(pattern, frame * PATTERN_SIZES.get(kind, 1.0), origin, rng)
    if pattern == "two-tone":  # the border crosses the cloth, wherever that lies
        v = (v - np.quantile(v[cloth], rng.uniform(0.5, 0.65))).astype(np.float32)
    paint = paint + ACCENT * (cloth & WEAVES[pattern](u, v)).astype(np.uint8)
    product = _reduced(_palette(colour)[paint])
    cover = _reduced(np.where(paint == HOLE, 0, 255).astype(np.uint8))[..., None] / np.float32(255)
    behind = _backdrop(rng) * (1 - _shadow(cover, rng))
    scene = (behind * (1 - cover) + product * cover) * _light(rng)
    scene += rng.standard_normal(scene.shape, dtype=np.float32) * np.float32(rng.uniform(1.5, 5))
    file = io.BytesIO()
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _pose(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Choose the 2 × 2 matrix and the origin that carry a shape into fine pixels."""
    tilt = math.radians(rng.normal(0, 7))
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    mirror = rng.choice([-1, 1])
    size = rng.uniform(0.72, 0.94) * FINE / 2
    stretch = np.diag([mirror * rng.uniform(0.9, 1.06), rng.uniform(0.9, 1.06)])
    return size * turn @ stretch, FINE / 2 + rng.uniform(-0.05, 0.05, 2) * FINE


def _painted(layers: Layers, frame: NDArray[np.float64], origin: NDArray[np.float64]) -> Image.Image:
    """Paint the layers as numbers into one fine grey image."""
    canvas = Image.new("L", (FINE, FINE), HOLE)
    pen = ImageDraw.Draw(canvas)
    for paint, points in layers:
        placed = np.array(points) @ frame.T + origin
        pen.polygon([(x, y) for x, y in placed.tolist()], fill=paint, outline=EDGE, width=2)
    return canvas


def _weave_plane(
    pattern: str, frame: NDArray[np.float64], origin: NDArray[np.float64], rng: np.random.Generator
) -> tuple[Plane, Plane]:
    """Return two coordinates of every fine pixel, in steps of the pattern, that move with the shape."""
    grain = math.radians(rng.choice(GRAINS[pattern]) + rng.normal(0, 3))
    turn = np.array([[math.cos(grain), math.sin(grain)], [-math.sin(grain), math.cos(grain)]])
    (a, b), (c, d) = (turn @ np.linalg.inv(frame) / rng.uniform(0.4, 0.52)).tolist()
    x = np.arange(FINE, dtype=np.float32)[None, :] - np.float32(origin[0])
    y = np.arange(FINE, dtype=np.float32)[:, None] - np.float32(origin[1])
    start_u, start_v = rng.uniform(0, 1, 2).tolist()
    return a * x + b * y + start_u, c * x + d * y + start_v


def _dotted(u: Plane, v: Plane) -> NDArray[np.bool_]:
    staggered = u + np.floor(v) % 2 / 2
    return (staggered % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1


WEAVES: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {
    "plain": lambda u, v: np.zeros(u.shape, dtype=np.bool_),
    "striped": lambda u, v: u % 1 < 0.45,
    "dotted": _dotted,
    "checked": lambda u, v: (np.floor(1.6 * u) + np.floor(1.6 * v)) % 2 == 0,
    "zigzag": lambda u, v: (v + 1.5 * np.abs(0.8 * u % 1 - 0.5)) % 1 < 0.45,
    "two-tone": lambda u, v: v > 0,
}
GRAINS = {  # degrees the pattern may lie at
    "plain": (0,),
    "striped": (0, 90, 45),
    "dotted": (0, 30),
    "checked": (0, 0, 45),
    "zigzag": (0, 0, 90),
    "two-tone": (0, 180),
}
PATTERN_SIZES = {"tie": 0.7, "watch": 0.7, "scarf": 0.8, "chair": 0.85, "sneaker": 0.85, "trousers": 0.85}


def _palette(colour: str) -> NDArray[np.uint8]:
    """Return the RGB colour of every paint number, shape (11, 3)."""
    main, accent = (np.array(tone) for tone in COLOURS[colour])
    edge = main * 0.45
    paints = [edge, main, main * 0.8, (164, 118, 74), (52, 48, 50), (176, 178, 182), (240, 238, 232), edge, edge]
    return np.array([*paints, accent, accent * 0.82]).astype(np.uint8)


def _reduced(fine: NDArray[np.uint8]) -> Plane:
    return np.asarray(Image.fromarray(fine).reduce(FINE // SIDE), dtype=np.float32)


def _ramp(degrees: float) -> Plane:
    """Return a ramp from about -1 to 1 over the photo, shape (128, 128)."""
    line = np.linspace(-1, 1, SIDE, dtype=np.float32)
    angle = math.radians(degrees)
    return line[None, :] * np.float32(math.cos(angle)) + line[:, None] * np.float32(math.sin(angle))


def _backdrop(rng: np.random.Generator) -> Plane:
    """Draw a white, grey, graded, shelf or floor background, shape (128, 128, 3)."""
    scenery = rng.choice(["white", "grey", "graded", "shelf", "floor"])
    low, high = {"white": (240, 255), "grey": (165, 205)}.get(str(scenery), (190, 240))
    wall = rng.uniform(low, high) + rng.uniform(-6, 6, 3)
    ground = np.broadcast_to(wall.astype(np.float32), (SIDE, SIDE, 3)).copy()
    if scenery == "graded":
        ground += np.float32(rng.uniform(15, 40)) * _ramp(rng.uniform(0, 360))[..., None]
    if scenery == "shelf":
        top = int(rng.uniform(0.78, 0.88) * SIDE)
        ground[top:] = np.array((172, 136, 98)) * rng.uniform(0.8, 1.2)
        ground[top : top + 2] *= 0.7
    if scenery == "floor":
        top = int(rng.uniform(0.55, 0.75) * SIDE)
        ground[top:] = wall * rng.uniform(0.7, 0.88)
        ground[top:] *= np.linspace(0.92, 1.06, SIDE - top, dtype=np.float32)[:, None, None]
    return ground


def _shadow(cover: Plane, rng: np.random.Generator) -> Plane:
    """Return how much the shape darkens the background, shape (128, 128, 1)."""
    shape = Image.fromarray((cover[..., 0] * 255).astype(np.uint8))
    shift = (1, 0, -float(rng.uniform(-7, 7)), 0, 1, -float(rng.uniform(2, 7)))
    cast = shape.transform(shape.size, Image.Transform.AFFINE, shift).filter(ImageFilter.GaussianBlur(4))
    return np.asarray(cast, dtype=np.float32)[..., None] * np.float32(rng.uniform(0.15, 0.45) / 255)


def _light(rng: np.random.Generator) -> Plane:
    """Return the factor of every pixel and channel: exposure, a tint and a lit side, shape (128, 128, 3)."""
    tint = rng.uniform(0.86, 1.06) * rng.uniform(0.96, 1.04, 3)
    lit = 1 + np.float32(rng.uniform(0.03, 0.18)) * _ramp(rng.uniform(0, 360))
    return lit[..., None] * tint.astype(np.float32)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> Points:
    """Outline an ellipse, or the part between two angles in degrees (0 right, 90 down)."""
    angles = np.radians(np.linspace(start, end, 29))
    return list(zip((x + rx * np.cos(angles)).tolist(), (y + ry * np.sin(angles)).tolist(), strict=True))


def _turned(*profile: tuple[float, float], x: float = 0.0) -> Points:
    """Outline a body that is alike on both sides of an axis, from (y, half width) downwards."""
    return [(x + half, y) for y, half in profile] + [(x - half, y) for y, half in reversed(profile)]


def _soft(points: Points) -> Points:
    """Round the corners by cutting them twice."""
    line = np.array(points)
    for _ in range(2):
        following = np.roll(line, -1, axis=0)
        line = np.stack([0.75 * line + 0.25 * following, 0.25 * line + 0.75 * following], axis=1).reshape(-1, 2)
    return [(x, y) for x, y in line.tolist()]


def _mug(vary: Vary) -> Layers:
    half, tall, grip = vary(0.5, 0.66), vary(0.6, 0.85), vary(0.34, 0.42)
    return [
        (FABRIC, _oval(half - 0.15, 0, grip, grip + 0.05)),
        (HOLE, _oval(half - 0.15, 0, grip - 0.17, grip - 0.12)),
        (FABRIC, _turned((-tall, half), (tall - 0.1, half * vary(0.8, 1)), (tall, half * 0.8), x=-0.2)),
        (SHADED, _oval(-0.2, -tall, half, 0.13)),
    ]


def _bowl(vary: Vary) -> Layers:
    deep, top = vary(0.65, 0.9), -0.3
    return [
        (SHADED, _box(-0.35, top + deep - 0.12, 0.35, top + deep + 0.08)),
        (FABRIC, _oval(0, top, 0.97, deep, 0, 180)),
        (SHADED, _oval(0, top, 0.97, vary(0.14, 0.26))),
    ]


def _teapot(vary: Vary) -> Layers:
    tall, spout = vary(0.5, 0.62), vary(-0.45, -0.2)
    return [
        (FABRIC, _oval(-0.62, 0.1, 0.36, 0.38)),
        (HOLE, _oval(-0.62, 0.1, 0.22, 0.24)),
        (FABRIC, [(0.35, 0.15), (0.82, spout), (1.0, spout + 0.05), (0.6, 0.5)]),
        (FABRIC, _oval(0, 0.15, 0.64, tall)),
        (SHADED, _oval(0, 0.2 - tall, 0.34, 0.13)),
        (DARK, _oval(0, 0.03 - tall, 0.1, 0.1)),
    ]


def _vase(vary: Vary) -> Layers:
    neck, belly, low = vary(0.14, 0.26), vary(0.55, 0.75), vary(0.0, 0.4)
    outline = _turned((-0.95, neck + 0.16), (-0.7, neck), (-0.4, neck), (low, belly), (0.6, 0.5), (0.95, 0.3))
    return [(FABRIC, _soft(outline)), (SHADED, _oval(0, -0.92, neck + 0.1, 0.08))]


def _bottle(vary: Vary) -> Layers:
    half, neck, shoulder = vary(0.32, 0.42), vary(0.12, 0.17), vary(-0.45, -0.25)
    outline = _turned((-0.7, neck), (shoulder - 0.1, neck), (shoulder + 0.15, half), (0.98, half))
    return [(FABRIC, outline), (METAL, _box(-neck - 0.04, -0.98, neck + 0.04, -0.68))]


def _plate(vary: Vary) -> Layers:
    flat, rim = vary(0.75, 0.95), vary(0.58, 0.7)
    return [
        (FABRIC, _oval(0, 0, 0.97, 0.97 * flat)),
        (SHADED, _oval(0, 0, rim, rim * flat)),
        (FABRIC, _oval(0, 0.03, rim - 0.07, (rim - 0.07) * flat)),
    ]


def _tshirt(vary: Vary) -> Layers:
    half, cuff, hem = vary(0.5, 0.6), vary(-0.2, 0.0), vary(0.8, 0.95)
    shirt = _turned((-0.85, 0.25), (-0.72, 0.55), (cuff - 0.2, 1.0), (cuff, 0.8), (-0.32, half), (hem, half))
    return [(FABRIC, shirt), (SHADED, _oval(0, -0.85, 0.26, vary(0.16, 0.3), 0, 180))]


def _dress(vary: Vary) -> Layers:
    waist, flare, drop = vary(0.22, 0.3), vary(0.6, 0.85), vary(-0.25, -0.05)
    gown = _turned((-0.95, 0.28), (-0.95, 0.4), (-0.55, 0.36), (drop, waist), (0.95, flare))
    return [
        (FABRIC, gown),
        (HOLE, _oval(0, -0.97, 0.26, 0.28, 0, 180)),
        (DARK, _turned((drop - 0.05, waist + 0.02), (drop + 0.05, waist + 0.02))),
    ]


def _trousers(vary: Vary) -> Layers:
    waist, hem, spread = vary(0.4, 0.48), vary(0.2, 0.28), vary(0.38, 0.46)
    legs = [(-waist, -0.95), (waist, -0.95), (spread + hem, 0.97), (spread - hem + 0.05, 0.97), (0, -0.3)]
    legs += [(hem - spread - 0.05, 0.97), (-spread - hem, 0.97)]
    return [(FABRIC, legs), (SHADED, _box(-waist - 0.01, -0.97, waist + 0.01, -0.8))]


def _skirt(vary: Vary) -> Layers:
    waist, flare, hem = vary(0.38, 0.48), vary(0.8, 0.98), vary(0.55, 0.75)
    seam = _oval(0, hem, flare, 0.16, 0, 180)
    return [
        (FABRIC, [(-waist, -0.65), (waist, -0.65), *seam]),
        (DARK, _box(-waist - 0.02, -0.78, waist + 0.02, -0.6)),
    ]


def _cap(vary: Vary) -> Layers:
    dome, brim = vary(0.75, 0.9), vary(0.95, 1.1)
    return [
        (FABRIC, _oval(-0.22, 0.3, 0.72, dome, 180, 360)),
        (SHADED, _soft([(-0.1, 0.2), (0.5, 0.14), (brim, 0.38), (brim, 0.52), (0.4, 0.42), (-0.1, 0.42)])),
        (DARK, _oval(-0.22, 0.3 - dome, 0.08, 0.05)),
    ]


def _scarf(vary: Vary) -> Layers:
    left, right, wide = vary(0.55, 0.8), vary(0.8, 0.97), vary(0.3, 0.36)
    fringe: Layers = [(SHADED, _box(x, right - 0.04, x + 0.05, right + 0.08)) for x in np.linspace(0.12, 0.44, 4)]
    return [
        *fringe,
        (SHADED, [(-0.2, -0.4), (0.1, -0.4), (-0.15, left), (-0.2 - 2 * wide, left - 0.05)]),
        (FABRIC, [(-0.1, -0.4), (0.35, -0.4), (0.2 + wide, right), (0.05, right)]),
        (FABRIC, _oval(0, -0.55, 0.62, 0.42)),
        (HOLE, _oval(0, -0.68, 0.4, 0.17)),
    ]


def _sock(vary: Vary) -> Layers:
    toe, half = vary(0.7, 0.95), vary(0.24, 0.3)
    x = -0.3
    foot = [(x - half, -0.95), (x + half, -0.95), (x + half, 0.2), (toe, 0.4), (toe, 0.9), (x - half, 0.9)]
    middle = [(x - half, -0.4), (x - half, 0.0), (x - half, 0.4), (x - half, 0.7)]
    return [
        (FABRIC, _soft([*foot, *reversed(middle)])),
        (SHADED, _box(x - half - 0.03, -0.95, x + half + 0.03, -0.7)),
        (SHADED, _oval(toe - 0.16, 0.64, 0.17, 0.22)),
    ]


def _sneaker(vary: Vary) -> Layers:
    heel, tongue, toe = vary(-0.4, -0.2), vary(-0.55, -0.4), vary(0.02, 0.18)
    upper = [(-0.95, 0.5), (-0.92, heel), (-0.6, heel + 0.08), (-0.2, tongue), (0.1, tongue + 0.1)]
    upper += [(0.35, toe - 0.1), (0.9, toe + 0.05), (1.0, 0.5)]
    lace_rows = np.linspace(0, 1, 3).tolist()
    laces: Layers = [
        (PALE, _box(0.02 + 0.2 * t, tongue + 0.12 + 0.22 * t, 0.26 + 0.2 * t, tongue + 0.19 + 0.22 * t))
        for t in lace_rows
    ]
    return [
        (FABRIC, upper),
        (SHADED, _oval(0.72, 0.5, 0.3, 0.38, 180, 360)),
        *laces,
        (PALE, _soft([(-1.02, 0.42), (1.05, 0.42), (1.05, 0.68), (-1.02, 0.68)])),
    ]


def _boot(vary: Vary) -> Layers:
    half, toe = vary(0.3, 0.36), vary(0.8, 0.95)
    x = -0.35
    leather = [(x - half, -0.92), (x + half, -0.92), (x + half, 0.1), (toe - 0.2, 0.3), (toe, 0.5), (toe, 0.75)]
    return [
        (FABRIC, [*leather, (x - half, 0.75)]),
        (SHADED, _box(x - half - 0.03, -0.95, x + half + 0.03, -0.75)),
        (DARK, _box(x - half - 0.02, 0.7, toe + 0.03, 0.83)),
        (DARK, _box(x - half - 0.02, 0.7, x + 0.1, 0.97)),
    ]


def _backpack(vary: Vary) -> Layers:
    half, pocket, crown = vary(0.55, 0.66), vary(0.1, 0.25), vary(0.4, 0.6)
    body = [(half, 0.9), (-half, 0.9), *_oval(0, crown - 0.85, half, crown, 180, 360)]
    return [
        (DARK, _oval(0, -0.85, 0.2, 0.18)),
        (HOLE, _oval(0, -0.85, 0.12, 0.1)),
        (DARK, _box(-half - 0.16, -0.2, -half + 0.05, 0.7)),
        (DARK, _box(half - 0.05, -0.2, half + 0.16, 0.7)),
        (FABRIC, body),
        (SHADED, _box(-half + 0.12, pocket, half - 0.12, 0.78)),
        (METAL, _box(-half + 0.16, pocket + 0.04, half - 0.16, pocket + 0.1)),
    ]


def _handbag(vary: Vary) -> Layers:
    top, low, rise = vary(0.6, 0.75), vary(0.8, 0.98), vary(0.65, 0.8)
    return [
        (DARK, _oval(0, -0.12, 0.46, rise)),
        (HOLE, _oval(0, -0.12, 0.36, rise - 0.1)),
        (FABRIC, [(-top, -0.15), (top, -0.15), (low, 0.85), (-low, 0.85)]),
        (METAL, _box(-0.1, -0.2, 0.1, 0.0)),
    ]


def _suitcase(vary: Vary) -> Layers:
    half, top, rise = vary(0.5, 0.62), vary(-0.55, -0.4), vary(0.3, 0.45)
    return [
        (METAL, _box(-0.28, top - rise, 0.28, top + 0.1)),
        (HOLE, _box(-0.2, top - rise + 0.08, 0.2, top + 0.1)),
        (DARK, _oval(-half + 0.14, 0.88, 0.11, 0.11)),
        (DARK, _oval(half - 0.14, 0.88, 0.11, 0.11)),
        (FABRIC, _soft(_turned((top, half), (-0.1, half), (0.5, half), (0.88, half)))),
        (SHADED, _box(-half + 0.18, top + 0.12, -half + 0.24, 0.8)),
        (SHADED, _box(half - 0.24, top + 0.12, half - 0.18, 0.8)),
    ]


def _umbrella(vary: Vary) -> Layers:
    high, brim, long = vary(0.75, 0.92), vary(0.0, 0.1), vary(0.75, 0.88)
    scallops = [_oval(x, brim, 0.2425, 0.09, 180, 360) for x in (-0.7275, -0.2425, 0.2425, 0.7275)]
    return [
        (DARK, _box(-0.03, -high - 0.08 + brim, 0.03, long)),
        (WOOD, _oval(0.12, long - 0.05, 0.17, 0.19, 0, 180)),
        (HOLE, _oval(0.12, long - 0.05, 0.07, 0.08, 0, 180)),
        (FABRIC, _oval(0, brim, 0.97, high, 180, 360)),
        *((HOLE, scallop) for scallop in scallops),
        (DARK, _box(-0.03, brim - 0.09, 0.03, long - 0.1)),
    ]


def _watch(vary: Vary) -> Layers:
    strap, dial = vary(0.27, 0.34), vary(0.44, 0.54)
    return [
        (FABRIC, _turned((-0.98, strap * 0.85), (-0.3, strap), (0.3, strap), (0.98, strap * 0.8))),
        (METAL, _box(dial - 0.05, -0.07, dial + 0.1, 0.07)),
        (METAL, _oval(0, 0, dial, dial)),
        (PALE, _oval(0, 0, dial - 0.1, dial - 0.1)),
        (DARK, _box(-0.03, -dial + 0.18, 0.03, 0.03)),
        (DARK, _box(-0.03, -0.03, dial - 0.22, 0.03)),
    ]


def _lamp(vary: Vary) -> Layers:
    top, low, hem = vary(0.28, 0.45), vary(0.65, 0.85), vary(0.0, 0.15)
    return [
        (METAL, _box(-0.05, hem - 0.1, 0.05, 0.85)),
        (METAL, _oval(0, 0.88, vary(0.3, 0.42), 0.09)),
        (FABRIC, [(-top, -0.9), (top, -0.9), (low, hem), (-low, hem)]),
    ]


def _cushion(vary: Vary) -> Layers:
    tuck, half = vary(0.1, 0.2), vary(0.75, 0.95)
    sides = [(-half, -half), (0, tuck - half), (half, -half), (half - tuck, 0)]
    sides += [(half, half), (0, half - tuck), (-half, half), (tuck - half, 0)]
    return [(FABRIC, sides)]


def _chair(vary: Vary) -> Layers:
    half, seat, back = vary(0.42, 0.52), vary(0.05, 0.18), vary(-0.98, -0.85)
    legs: Layers = [
        (WOOD, _box(x, seat + 0.1, x + 0.09, low))
        for x, low in ((-half - 0.02, 0.95), (half - 0.02, 0.95), (-half + 0.2, 0.8), (half - 0.3, 0.8))
    ]
    return [
        *legs,
        (WOOD, _box(-half, -0.4, -half + 0.08, seat)),
        (WOOD, _box(half - 0.08, -0.4, half, seat)),
        (FABRIC, _box(-half, back, half, seat - 0.3)),
        (FABRIC, _turned((seat - 0.12, half), (seat + 0.18, half + 0.12))),
    ]


def _sofa(vary: Vary) -> Layers:
    back, arm, wide = vary(-0.6, -0.4), vary(0.2, 0.3), 1.0
    return [
        (WOOD, _box(-0.85, 0.5, -0.73, 0.72)),
        (WOOD, _box(0.73, 0.5, 0.85, 0.72)),
        (FABRIC, _box(-wide + 0.1, back, wide - 0.1, 0.3)),
        (FABRIC, _box(-wide + arm, 0.08, 0, 0.35)),
        (FABRIC, _box(0, 0.08, wide - arm, 0.35)),
        (SHADED, _box(-wide, 0.33, wide, 0.56)),
        (SHADED, _soft(_box(-wide - 0.04, -0.2, -wide + arm, 0.6))),
        (SHADED, _soft(_box(wide - arm, -0.2, wide + 0.04, 0.6))),
    ]


def _rug(vary: Vary) -> Layers:
    high, far = vary(0.45, 0.6), vary(0.65, 0.8)
    tufts: Layers = []
    for t in np.linspace(-1, 1, 13).tolist():
        tufts.append((PALE, _box(t * 0.95 - 0.025, high, t * 0.95 + 0.025, high + 0.13)))
        tufts.append((PALE, _box(t * far * 0.97 - 0.02, -high - 0.1, t * far * 0.97 + 0.02, -high)))
    return [*tufts, (FABRIC, [(-far, -high), (far, -high), (0.99, high), (-0.99, high)])]


def _tie(vary: Vary) -> Layers:
    wide, knot = vary(0.3, 0.38), vary(0.18, 0.24)
    return [
        (FABRIC, [(-0.13, -0.65), (0.13, -0.65), (wide, 0.65), (0, 0.98), (-wide, 0.65)]),
        (SHADED, [(-knot, -0.98), (knot, -0.98), (0.13, -0.62), (-0.13, -0.62)]),
    ]


SHAPES: dict[str, Callable[[Vary], Layers]] = {
    "mug": _mug,
    "bowl": _bowl,
    "teapot": _teapot,
    "vase": _vase,
    "bottle": _bottle,
    "plate": _plate,
    "t-shirt": _tshirt,
    "dress": _dress,
    "trousers": _trousers,
    "skirt": _skirt,
    "cap": _cap,
    "scarf": _scarf,
    "sock": _sock,
    "sneaker": _sneaker,
    "boot": _boot,
    "backpack": _backpack,
    "handbag": _handbag,
    "suitcase": _suitcase,
    "umbrella": _umbrella,
    "watch": _watch,
    "lamp": _lamp,
    "cushion": _cushion,
    "chair": _chair,
    "sofa": _sofa,
    "rug": _rug,
    "tie": _tie,
}
