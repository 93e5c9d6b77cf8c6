"""Ground truth agrees with pixels, captions are complete, and statements have their stated truth."""

import colorsys
from collections import Counter

import numpy as np
import pytest

from demo.questions import SKILLS, Statement, changed_caption, statement, statements
from demo.scenes import Scene, SceneObject, caption, parse_caption, plural, render, sample_scene
from demo.sprites import BACKGROUNDS, COLOURS, NOUNS


def _scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def _hue_and_value(rgb: np.ndarray) -> tuple[float, float]:
    hue, _, value = colorsys.rgb_to_hsv(*(rgb / 255.0))
    return hue, value


def test_there_are_enough_nouns_colours_and_backgrounds() -> None:
    assert len(NOUNS) >= 24
    assert len(COLOURS) == 8
    assert len(BACKGROUNDS) == 8


@pytest.mark.parametrize("noun", sorted(NOUNS))
def test_object_has_its_stated_colour_in_the_pixels(noun: str) -> None:
    for colour in COLOURS:
        scene = Scene(
            objects=(SceneObject(noun=noun, colour=colour, centre_x=128, centre_y=128, size_px=110),), background="grey"
        )
        box = np.asarray(render(scene))[73:183, 73:183].reshape(-1, 3).astype(float)
        saturated = box[(box.max(1) - box.min(1)) > 50]
        assert len(saturated) > 400, f"{colour} {noun}: hardly any coloured pixels"
        distances = {name: np.linalg.norm(saturated - np.array(rgb), axis=1) for name, rgb in COLOURS.items()}
        nearest = Counter(np.array(list(distances))[np.argmin(np.stack(list(distances.values())), axis=0)].tolist())
        assert nearest.most_common(1)[0][0] == colour, f"{colour} {noun}: looks {nearest.most_common(2)}"


def test_every_object_contrasts_with_its_background() -> None:
    for scene in _scenes(120):
        empty = np.asarray(render(Scene(objects=(), background=scene.background))).astype(int).reshape(-1, 3)
        pixels = np.asarray(render(scene)).astype(int)
        usual = empty.mean(0)
        for o in scene.objects:
            half = o.size_px // 2
            y, x = round(o.centre_y), round(o.centre_x)
            box = pixels[max(0, y - half) : y + half, max(0, x - half) : x + half].reshape(-1, 3)
            share = (np.abs(box - usual).max(1) > 40).mean()
            assert share > 0.12, f"{o} on {scene.background}: only {share:.0%} of its pixels differ"


def test_objects_stay_inside_and_do_not_overlap() -> None:
    for scene in _scenes(300):
        assert 1 <= len(scene.objects) <= 4
        for i, a in enumerate(scene.objects):
            assert a.centre_x >= a.size_px / 2 and a.centre_x + a.size_px / 2 <= 256
            assert a.centre_y >= a.size_px / 2 and a.centre_y + a.size_px / 2 <= 256
            for b in scene.objects[i + 1 :]:
                gap = max(abs(a.centre_x - b.centre_x), abs(a.centre_y - b.centre_y)) - (a.size_px + b.size_px) / 2
                assert gap >= -1


def test_caption_parses_to_the_ground_truth() -> None:
    for scene in _scenes(500):
        facts = parse_caption(caption(scene))
        assert facts.groups == scene.groups()
        assert facts.background == scene.background
        assert len(caption(scene).split()) <= 25
        if len(facts.groups) == 2:
            assert facts.relation == scene.relation(*facts.groups)


def test_render_is_a_pure_function_of_the_scene() -> None:
    for scene in _scenes(5):
        assert np.array_equal(np.asarray(render(scene)), np.asarray(render(scene)))
        assert render(scene, 64).size == (64, 64)


def test_every_skill_has_true_and_false_statements() -> None:
    rng = np.random.default_rng(1)
    seen = Counter((item.skill, item.answer) for scene in _scenes(600) for item in statements(scene, rng))
    assert set(seen) == {(skill, answer) for skill in SKILLS for answer in (True, False)}


def _words(item: Statement) -> tuple[str, ...]:
    return tuple(item.text.split())


def test_true_and_false_statements_differ_for_the_same_scene() -> None:
    rng = np.random.default_rng(2)
    for scene in _scenes(200):
        for skill in SKILLS:
            true, false = statement(scene, skill, True, rng), statement(scene, skill, False, rng)
            if true is not None and false is not None:
                assert _words(true) != _words(false), (skill, true.text)


def test_counting_attribute_and_negation_answers_follow_the_ground_truth() -> None:
    rng = np.random.default_rng(3)
    for scene in _scenes(300):
        nouns = {o.noun for o in scene.objects}
        for item in statements(scene, rng):
            words = item.text.split()
            if item.skill == "negation" and words[-1] != "objects":
                named = next(noun for noun in NOUNS if plural(noun) == words[-1])
                assert item.answer == (named not in nouns), (item, nouns)
            if item.skill == "attribute":
                facts = parse_caption(f"{item.text if words[0] in ('a', 'an') else 'two ' + item.text} on grass")
                assert item.answer == (next(iter(facts.groups)) in scene.groups()), (item, scene.groups())


def test_changed_caption_is_false_for_the_scene() -> None:
    rng = np.random.default_rng(4)
    for scene in _scenes(300):
        _, text = changed_caption(scene, rng)
        changed, facts = parse_caption(text), parse_caption(caption(scene))
        assert changed != facts


def test_colours_differ_in_hue_or_brightness() -> None:
    values = {name: _hue_and_value(np.array(rgb))[1] for name, rgb in COLOURS.items()}
    hues = {name: _hue_and_value(np.array(rgb))[0] for name, rgb in COLOURS.items()}
    for a in COLOURS:
        for b in COLOURS:
            if a < b:
                assert abs(hues[a] - hues[b]) > 0.03 or abs(values[a] - values[b]) > 0.2, (a, b)
