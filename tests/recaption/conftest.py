"""Images, a tiny random Qwen3-VL, and one real pool of engines on Ray, shared by the tests of this package."""

import io
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from pipelines.core.config import ModelRef
from recaption.config import PoolConfig, VllmEngineConfig
from recaption.engine import VisionRequest
from tests.tiny_models import write_qwen3_vl

POOL = PoolConfig(max_actors=1, max_actor_restarts=2, object_store_memory_bytes=80 << 20)


@lru_cache
def noise_jpeg(seed: int, image_px: int = 64) -> bytes:
    """Return a JPEG of smooth noise, which the random model answers differently for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((image_px, image_px), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def request(seed: int, text: str = "Describe this image.", max_tokens: int = 12, **kwargs: object) -> VisionRequest:
    return VisionRequest(image_bytes=noise_jpeg(seed), text=text, max_tokens=max_tokens, **kwargs)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_qwen3_vl(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def engine_config(vlm: ModelRef) -> VllmEngineConfig:
    return VllmEngineConfig(
        model=vlm,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        omp_num_threads=1,
        offline=True,
    )


@pytest.fixture(scope="package")
def pool(engine_config: VllmEngineConfig) -> Iterator[object]:
    """The pool that `engine_pool(engine_config, POOL)` returns everywhere in this process."""
    from recaption.ray_pool import close_pools, engine_pool

    started = engine_pool(engine_config, POOL)
    started.start()
    yield started
    close_pools()
