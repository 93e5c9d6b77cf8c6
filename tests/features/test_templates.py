import pytest

from features.templates import apply_template, unconditional_text


def test_the_released_template_joins_instruction_and_caption():
    assert apply_template("released-1", "A dog.") == "Describe this image.A dog."


def test_the_unconditional_text_is_the_instruction_or_empty():
    assert unconditional_text("released-1", "instruction") == "Describe this image."
    assert unconditional_text("released-1", "empty") == ""
    assert unconditional_text("plain-1", "instruction") == unconditional_text("plain-1", "empty") == ""


def test_captions_with_braces_are_unchanged():
    assert apply_template("plain-1", "{caption} {0}") == "{caption} {0}"


def test_an_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match="plain-1, released-1"):
        apply_template("plain-2", "")
