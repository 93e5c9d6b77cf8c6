"""The demo's ground truth: scenes, their random generation, rendering, and canonical captions.

`demo.sprites` draws the pixels; `demo.questions` makes true and false statements about a scene.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from PIL import Image

from demo.sprites import BACKGROUNDS, COLOURS, NOUNS, background, sprite

SCENE_PX = 256
MAX_OBJECTS = 4

NUMBER_WORDS = ("zero", "one", "two", "three", "four")
BACKGROUND_PHRASES = MappingProxyType(
    {
        "brick": "on a brick wall",
        "grass": "on grass",
        "grey": "on a plain grey background",
        "night": "in the night sky",
        "sand": "on sand",
        "snow": "on snow",
        "water": "on water",
        "wood": "on a wooden table",
    }
)
RELATIONS = ("to the left of", "to the right of", "above", "below")
INVERSE_RELATION = MappingProxyType(dict(zip(RELATIONS, (*RELATIONS[1::-1], *RELATIONS[:1:-1]), strict=True)))


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: its centre and longest side in pixels of a 256 px scene."""

    noun: str
    colour: str
    centre_x: float
    centre_y: float
    size_px: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The full content of an image; `render` is a pure function of it."""

    objects: tuple[SceneObject, ...]
    background: str

    def groups(self) -> dict[tuple[str, str], int]:
        """Return {(colour, noun): count} in caption order: by noun, then colour."""
        counts = Counter((o.colour, o.noun) for o in self.objects)
        return dict(sorted(counts.items(), key=lambda item: (item[0][1], item[0][0])))

    def members(self, group: tuple[str, str]) -> list[SceneObject]:
        """Return the objects of one (colour, noun) group."""
        return [o for o in self.objects if (o.colour, o.noun) == group]

    def relation(self, first: tuple[str, str], second: tuple[str, str]) -> str | None:
        """Return the spatial relation of group `first` to group `second`, or None if it is ambiguous.

        It is unambiguous if the two groups' centres are separated along one axis and their mean centres differ along
        it at least 1.4 times as much as along the other.
        """
        a = np.array([(o.centre_x, o.centre_y) for o in self.members(first)])
        b = np.array([(o.centre_x, o.centre_y) for o in self.members(second)])
        offset = a.mean(axis=0) - b.mean(axis=0)
        axis = int(np.argmax(np.abs(offset)))
        if abs(offset[axis]) < 48 or abs(offset[axis]) < 1.4 * abs(offset[1 - axis]):
            return None
        before = offset[axis] < 0
        gap = b[:, axis].min() - a[:, axis].max() if before else a[:, axis].min() - b[:, axis].max()
        if gap < 24:
            return None
        return RELATIONS[2 * axis + (0 if before else 1)]


_PARTITIONS = MappingProxyType(
    {
        1: ((1,),),
        2: ((2,), (1, 1), (1, 1)),
        3: ((3,), (1, 2), (2, 1), (1, 1, 1)),
        4: ((4,), (1, 3), (3, 1), (2, 2), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 1, 1)),
    }
)
_COUNT_ODDS = (0.18, 0.32, 0.28, 0.22)

_Cell = tuple[float, float, float, float]


def _sample_groups(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Return `count` distinct random (colour, noun) groups, which often share noun or colour."""
    nouns, colours = sorted(NOUNS), sorted(COLOURS)
    shared = rng.random()
    groups: list[tuple[str, str]] = []
    while len(groups) < count:
        colour, noun = colours[rng.integers(len(colours))], nouns[rng.integers(len(nouns))]
        if groups and shared < 0.25:
            noun = groups[0][1]
        elif groups and shared < 0.45:
            colour = groups[0][0]
        if (colour, noun) not in groups:
            groups.append((colour, noun))
    return groups


def _strip(count: int, cell: _Cell, axis: int) -> list[_Cell]:
    """Split a cell (x0, y0, x1, y1) into `count` equal ones along an axis (0 is x)."""
    low, high = cell[axis], cell[axis + 2]
    edges = np.linspace(low, high, count + 1)
    cells = []
    for start, stop in pairwise(edges):
        part = list(cell)
        part[axis], part[axis + 2] = float(start), float(stop)
        cells.append((part[0], part[1], part[2], part[3]))
    return cells


def _sample_cells(rng: np.random.Generator, counts: tuple[int, ...]) -> list[_Cell]:
    """Return one cell per object, in group order. Two groups get one half each, so that their relation is clear."""
    whole: _Cell = (4.0, 4.0, SCENE_PX - 4.0, SCENE_PX - 4.0)
    total, axis = sum(counts), int(rng.integers(2))
    if len(counts) == 2:
        halves = _strip(2, whole, axis)
        if rng.random() < 0.5:
            halves.reverse()
        return [cell for half, count in zip(halves, counts, strict=True) for cell in _strip(count, half, 1 - axis)]
    if total <= 2:
        cells = _strip(total, whole, axis)
    elif total == 3 and rng.random() < 0.3:
        cells = _strip(3, whole, axis)
    else:
        cells = [cell for half in _strip(2, whole, 0) for cell in _strip(2, half, 1)]
    return [cells[i] for i in rng.permutation(len(cells))[:total]]


def _place(rng: np.random.Generator, group: tuple[str, str], cell: _Cell) -> SceneObject:
    room = min(cell[2] - cell[0], cell[3] - cell[1])
    largest = int(min(116, room - 4))
    size = int(rng.integers(max(70, round(0.85 * largest)), largest + 1))
    half = size / 2
    return SceneObject(
        noun=group[1],
        colour=group[0],
        centre_x=round(float(rng.uniform(cell[0] + half, cell[2] - half)), 1),
        centre_y=round(float(rng.uniform(cell[1] + half, cell[3] - half)), 1),
        size_px=size,
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    """Return a random scene of one to four objects."""
    total = int(rng.choice(np.arange(1, MAX_OBJECTS + 1), p=_COUNT_ODDS))
    counts = _PARTITIONS[total][rng.integers(len(_PARTITIONS[total]))]
    groups = _sample_groups(rng, len(counts))
    name = sorted(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    owners = [group for group, count in zip(groups, counts, strict=True) for _ in range(count)]
    while True:
        cells = _sample_cells(rng, counts)
        objects = tuple(_place(rng, group, cell) for group, cell in zip(owners, cells, strict=True))
        scene = Scene(objects=objects, background=name)
        if len(groups) != 2 or scene.relation(groups[0], groups[1]):
            return scene


def render(scene: Scene, size_px: int = SCENE_PX) -> Image.Image:
    """Return the RGB image of a scene; the same scene gives the same pixels."""
    seed = zlib.crc32(repr(scene).encode())
    canvas = background(scene.background, seed % 128, (seed >> 8) % 128, SCENE_PX)
    for o in scene.objects:
        image = sprite(o.noun, o.colour, o.size_px)
        canvas.paste(image, (round(o.centre_x - image.width / 2), round(o.centre_y - image.height / 2)), image)
    return canvas if size_px == SCENE_PX else canvas.resize((size_px, size_px), Image.Resampling.BICUBIC)


def plural(noun: str) -> str:
    """Return the plural of one of `NOUNS`."""
    if noun == "fish":
        return noun
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh")) else "s")


def group_phrase(group: tuple[str, str], count: int) -> str:
    """Return "a red apple", "an orange car", "three blue fish"."""
    colour, noun = group
    if count == 1:
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}"
    return f"{NUMBER_WORDS[count]} {colour} {plural(noun)}"


def list_phrase(phrases: list[str]) -> str:
    """Join phrases as "x, y and z"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene) -> str:
    """Return the one canonical caption: groups by noun and colour, a relation between two, background."""
    groups = scene.groups()
    phrases = [group_phrase(group, count) for group, count in groups.items()]
    relation = scene.relation(*groups) if len(groups) == 2 else None
    body = f" {relation} ".join(phrases) if relation else list_phrase(phrases)
    return f"{body} {BACKGROUND_PHRASES[scene.background]}"


@dataclass(frozen=True, kw_only=True)
class CaptionFacts:
    """The facts in a canonical caption."""

    groups: dict[tuple[str, str], int]
    relation: str | None
    background: str


_SINGULAR = MappingProxyType({plural(noun): noun for noun in NOUNS} | {noun: noun for noun in NOUNS})
_GROUP = re.compile(
    rf"(an?|two|three|four) ({'|'.join(COLOURS)}) ({'|'.join(sorted(_SINGULAR, key=len, reverse=True))})"
)


def parse_caption(text: str) -> CaptionFacts:
    """Return the facts in a canonical caption; raises ValueError if `text` is not one."""
    name = next((k for k, phrase in BACKGROUND_PHRASES.items() if text.endswith(f" {phrase}")), None)
    if name is None:
        raise ValueError(f"{text!r} ends in no known background; known: {', '.join(BACKGROUND_PHRASES.values())}")
    body = text.removesuffix(f" {BACKGROUND_PHRASES[name]}")
    relation = next((r for r in RELATIONS if f" {r} " in body), None)
    groups: dict[tuple[str, str], int] = {}
    for phrase in re.split(rf", | and | {relation} " if relation else r", | and ", body):
        match = _GROUP.fullmatch(phrase)
        if match is None:
            raise ValueError(f"{text!r}: {phrase!r} names no group of objects")
        word, colour, noun = match.groups()
        groups[colour, _SINGULAR[noun]] = 1 if word in ("a", "an") else NUMBER_WORDS.index(word)
    return CaptionFacts(groups=groups, relation=relation, background=name)
