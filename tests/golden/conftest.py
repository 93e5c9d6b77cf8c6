"""The tiny data of the training tests."""

from tests.training.conftest import llm, tiny_data

__all__ = ["llm", "tiny_data"]
