"""True and false statements about a scene, for each skill of GenAI-Bench that such scenes can test.

False statements are hard negatives: a true one with one word changed, or one that is true of another scene.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from demo.scenes import (
    BACKGROUND_PHRASES,
    INVERSE_RELATION,
    NUMBER_WORDS,
    RELATIONS,
    Scene,
    caption,
    group_phrase,
    list_phrase,
    plural,
)
from demo.sprites import COLOURS, NOUNS

_Group = tuple[str, str]
_NOUNS, _COLOURS, _BACKGROUNDS = sorted(NOUNS), sorted(COLOURS), sorted(BACKGROUND_PHRASES)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement for the judge's question, the skill it tests, and whether it is true of the scene."""

    skill: str
    text: str
    answer: bool


def _pick(rng: np.random.Generator, items: list[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _other(rng: np.random.Generator, items: list[str], used: str) -> str:
    return _pick(rng, [item for item in items if item != used])


def _group(rng: np.random.Generator, scene: Scene) -> tuple[_Group, int]:
    groups = list(scene.groups().items())
    return groups[int(rng.integers(len(groups)))]


def _changed_group(rng: np.random.Generator, scene: Scene, group: _Group) -> _Group:
    """Return a group that the scene lacks and that differs from `group` in one word, often one used elsewhere in it."""
    seen_colours = [o.colour for o in scene.objects]
    seen_nouns = [o.noun for o in scene.objects]
    while True:
        if rng.random() < 0.5:
            pool = seen_colours if rng.random() < 0.4 else _COLOURS
            changed = (_pick(rng, pool), group[1])
        else:
            pool = seen_nouns if rng.random() < 0.4 else _NOUNS
            changed = (group[0], _pick(rng, pool))
        if changed not in scene.groups():
            return changed


def _some(group: _Group, count: int) -> str:
    return group_phrase(group, 1) if count == 1 else f"{group[0]} {plural(group[1])}"


def _attribute(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    group, count = _group(rng, scene)
    return _some(group if answer else _changed_group(rng, scene, group), count)


def _scene(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    name = scene.background if answer else _other(rng, _BACKGROUNDS, scene.background)
    if rng.random() < 0.4:
        return f"objects {BACKGROUND_PHRASES[name]}"
    group, count = _group(rng, scene)
    return f"{group_phrase(group, count)} {BACKGROUND_PHRASES[name]}"


def _spatial_relation(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    groups = scene.groups()
    if len(groups) != 2:
        return None
    first, second = list(groups) if rng.random() < 0.5 else list(groups)[::-1]
    relation = scene.relation(first, second)
    if relation is None:
        return None
    if not answer:
        relation = INVERSE_RELATION[relation] if rng.random() < 0.7 else _other(rng, list(RELATIONS), relation)
    return f"{group_phrase(first, groups[first])} {relation} {group_phrase(second, groups[second])}"


def _counting(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    group, count = _group(rng, scene)
    if rng.random() < 0.25:
        total = len(scene.objects) if answer else int(_other(rng, ["1", "2", "3", "4"], str(len(scene.objects))))
        return "one object" if total == 1 else f"{NUMBER_WORDS[total]} objects"
    stated = count if answer else int(_other(rng, ["1", "2", "3", "4"], str(count)))
    return f"one {group[0]} {group[1]}" if stated == 1 else group_phrase(group, stated)


def _comparison(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    counts = Counter(o.noun for o in scene.objects)
    if len(counts) < 2:
        return None
    first, second = (str(noun) for noun in rng.permutation(sorted(counts))[:2])
    if (counts[first] > counts[second]) != answer:
        first, second = second, first
    if (counts[first] > counts[second]) != answer:
        return None
    return f"more {plural(first)} than {plural(second)}"


def _differentiation(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    by_noun: dict[str, list[_Group]] = {}
    for group, count in scene.groups().items():
        if count == 1:
            by_noun.setdefault(group[1], []).append(group)
    pairs = [groups[:2] for groups in by_noun.values() if len(groups) > 1]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    if rng.random() < 0.5:
        first, second = second, first
    if not answer:
        colours = [colour for colour in _COLOURS if (colour, first[1]) not in scene.groups()]
        second = (_pick(rng, colours), second[1])
    return f"one {first[0]} {first[1]} and one {second[0]} {second[1]}"


def _negation(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    nouns, colours = {o.noun for o in scene.objects}, {o.colour for o in scene.objects}
    if rng.random() < 0.7:
        return f"no {plural(_pick(rng, [noun for noun in _NOUNS if (noun not in nouns) == answer]))}"
    return f"no {_pick(rng, [colour for colour in _COLOURS if (colour not in colours) == answer])} objects"


def _universal(scene: Scene, answer: bool, rng: np.random.Generator) -> str | None:
    if len(scene.objects) < 2:
        return None
    nouns, colours = {o.noun for o in scene.objects}, {o.colour for o in scene.objects}
    if rng.random() < 0.6:
        if answer:
            return f"all objects are {next(iter(colours))}" if len(colours) == 1 else None
        colour = _pick(rng, sorted(colours)) if len(colours) > 1 else _other(rng, _COLOURS, next(iter(colours)))
        return f"all objects are {colour}"
    if answer:
        return f"all objects are {plural(next(iter(nouns)))}" if len(nouns) == 1 else None
    noun = _pick(rng, sorted(nouns)) if len(nouns) > 1 else _other(rng, _NOUNS, next(iter(nouns)))
    return f"all objects are {plural(noun)}"


_MAKERS: MappingProxyType[str, Callable[[Scene, bool, np.random.Generator], str | None]] = MappingProxyType(
    {
        "attribute": _attribute,
        "scene": _scene,
        "spatial relation": _spatial_relation,
        "counting": _counting,
        "comparison": _comparison,
        "differentiation": _differentiation,
        "negation": _negation,
        "universal": _universal,
    }
)
SKILLS = tuple(_MAKERS)


def changed_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return (skill, false caption): the scene's caption with one fact changed, and the skill that detects it."""
    groups = scene.groups()
    kinds = ["attribute", "counting", "scene"] + ["spatial relation"] * (len(groups) == 2)
    skill = _pick(rng, kinds)
    if skill == "scene":
        name = _other(rng, _BACKGROUNDS, scene.background)
        text = caption(scene).removesuffix(BACKGROUND_PHRASES[scene.background]) + BACKGROUND_PHRASES[name]
        return skill, text
    if skill == "spatial relation":
        relation = scene.relation(*groups)
        if relation is not None:
            return skill, caption(scene).replace(f" {relation} ", f" {INVERSE_RELATION[relation]} ")
        skill = "attribute"
    target = int(rng.integers(len(groups)))
    phrases = []
    for index, (group, count) in enumerate(groups.items()):
        if index != target:
            phrases.append(group_phrase(group, count))
        elif skill == "counting":
            phrases.append(group_phrase(group, int(_other(rng, ["1", "2", "3", "4"], str(count)))))
        else:
            phrases.append(group_phrase(_changed_group(rng, scene, group), count))
    relation = scene.relation(*groups) if len(groups) == 2 else None
    body = f" {relation} ".join(phrases) if relation else list_phrase(phrases)
    return skill, f"{body} {BACKGROUND_PHRASES[scene.background]}"


def statement(scene: Scene, skill: str, answer: bool, rng: np.random.Generator) -> Statement | None:
    """Return a statement for `skill` whose truth is `answer`, or None if the scene allows none."""
    text = _MAKERS[skill](scene, answer, rng)
    return None if text is None else Statement(skill=skill, text=text, answer=answer)


def statements(scene: Scene, rng: np.random.Generator) -> list[Statement]:
    """Return one randomly true or false statement for each skill that the scene can test."""
    items = (statement(scene, skill, bool(rng.random() < 0.5), rng) for skill in SKILLS)
    return [item for item in items if item is not None]
