"""Loads the engine that a configuration names; nothing imports vLLM or httpx before."""

from recaption.config import EngineConfig, OpenAIEngineConfig
from recaption.engine import VisionLanguageEngine


def load_engine(config: EngineConfig) -> VisionLanguageEngine:
    """Load the engine in this process. Raises ThroughlineError if its package or model is missing."""
    if isinstance(config, OpenAIEngineConfig):
        from recaption.openai_engine import OpenAIEngine

        return OpenAIEngine(config)
    from recaption.vllm_engine import VllmEngine

    return VllmEngine(config)
