"""Order, layouts, resume and bad samples of the reader, over real shards and a real DataLoader."""

import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pipelines.core.errors import ThroughlineError
from pipelines.dataset.order import SampleOrder, Share, StepIndices
from pipelines.dataset.samples import ShardSamples
from pipelines.dataset.stream import SampleBatch, ShardStream
from pipelines.shards.format import ShardWriter
from pipelines.shards.reader import BadSampleError, Sample
from training.data.data_order import DataOrder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
NUM_SAMPLES = 23


def key_of(index: int) -> str:
    return f"{index:032x}"


def image_bytes(index: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (index * 10, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, bad: Sequence[int] = (), contradicting: Sequence[int] = ()) -> list[Path]:
    """Shards of 10, 10 and 3 samples; a caption is its sample's index. Bad ones do not decode."""
    paths = []
    for first in range(0, NUM_SAMPLES, 10):
        path = folder / f"shard-{first // 10:05d}.tar"
        with path.open("wb") as stream:
            writer = ShardWriter(stream, path.name)
            for index in range(first, min(first + 10, NUM_SAMPLES)):
                image = b"not an image" if index in bad else image_bytes(index)
                stated = "other" if index in contradicting else str(index)
                writer.add(key_of(index), image, str(index), {"sample_key": key_of(index), "caption": stated})
            writer.finish()
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> ShardSamples:
    return ShardSamples.of_shards(write_shards(tmp_path_factory.mktemp("shards")), max_open_shards=2)


def caption(sample: Sample) -> int:
    return int(sample.caption)


def batches(samples: ShardSamples, share: Share, num_workers: int = 0, **options: object) -> list[SampleBatch]:
    stream = ShardStream(samples, share, **{"seed": 7, "decode": caption, **options})  # type: ignore[arg-type]
    return list(DataLoader(stream, batch_size=None, num_workers=num_workers))


def captions(found: Sequence[SampleBatch]) -> list[int]:
    return [item for batch in found for item in batch.items]


def test_order_is_the_same_as_in_training() -> None:
    order, of_training = SampleOrder("version", 3, 11), DataOrder("version", 3, 4, 11)
    for step in range(9):
        np.testing.assert_array_equal(order.take(step * 4, step * 4 + 4), of_training.indices(step))


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 40), batch_size=st.integers(1, 7), num_ranks=st.integers(1, 4),
    num_workers=st.integers(1, 3), consumed=st.integers(0, 50), length=st.integers(0, 60),
)  # fmt: skip
def test_shares_are_disjoint_and_complete_in_any_layout(
    num_samples: int, batch_size: int, num_ranks: int, num_workers: int, consumed: int, length: int
) -> None:
    order = SampleOrder("version", 0, num_samples)
    shares = [
        Share(batch_size=batch_size, rank=rank, num_ranks=num_ranks, consumed=consumed, stop=consumed + length)
        for rank in range(num_ranks)
    ]
    steps = [step for share in shares for worker in range(num_workers) for step in share.steps(worker, num_workers)]
    places = [place for step in steps for place in range(step.start, step.stop)]
    assert sorted(places) == list(range(consumed, consumed + length))
    assert len({share.num_steps for share in shares}) == 1
    by_step = [
        order.take(step.start, step.stop) for row in zip(*(s.steps() for s in shares), strict=True) for step in row
    ]
    np.testing.assert_array_equal(
        np.concatenate([*by_step, np.zeros(0, np.int64)]), order.take(consumed, consumed + length)
    )


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_epoch_yields_every_sample_once_in_the_declared_order(samples: ShardSamples, num_workers: int) -> None:
    found = batches(samples, Share(batch_size=4, stop=NUM_SAMPLES), num_workers)
    assert captions(found) == SampleOrder(samples.data_version, 7, NUM_SAMPLES).take(0, NUM_SAMPLES).tolist()
    assert sorted(captions(found)) == list(range(NUM_SAMPLES))
    assert [batch.consumed for batch in found] == [4, 8, 12, 16, 20, 23]
    second = batches(samples, Share(batch_size=4, consumed=NUM_SAMPLES, stop=2 * NUM_SAMPLES))
    assert sorted(captions(second)) == list(range(NUM_SAMPLES)) and captions(second) != captions(found)


def test_a_run_resumes_in_another_layout(samples: ShardSamples) -> None:
    whole = SampleOrder(samples.data_version, 7, NUM_SAMPLES).take(0, 60).tolist()
    seen: list[int] = []
    consumed = 0
    for num_ranks, batch_size, num_workers, num_steps in ((2, 3, 2, 3), (1, 5, 0, 4), (3, 2, 1, 2)):
        ranks = []
        for rank in range(num_ranks):
            stop = consumed + num_ranks * batch_size * num_steps
            share = Share(batch_size=batch_size, rank=rank, num_ranks=num_ranks, consumed=consumed, stop=stop)
            ranks.append(batches(samples, share, num_workers))
        for row in zip(*ranks, strict=True):
            seen += captions(row)
            assert len({batch.consumed for batch in row}) == 1
        consumed = ranks[0][-1].consumed
    assert seen == whole[:consumed]


def test_prefetched_batches_do_not_count_as_consumed(samples: ShardSamples) -> None:
    loader = iter(DataLoader(ShardStream(samples, Share(batch_size=2), seed=7), batch_size=None, num_workers=2))
    last = [next(loader) for _ in range(3)][-1]
    del loader
    assert last.consumed == 6
    (following,) = batches(samples, Share(batch_size=4, consumed=last.consumed, stop=10))
    assert captions([following]) == SampleOrder(samples.data_version, 7, NUM_SAMPLES).take(6, 10).tolist()


def test_pixels_and_captions_are_the_default(samples: ShardSamples) -> None:
    (batch,) = DataLoader(ShardStream(samples, Share(batch_size=5, stop=5), seed=1), batch_size=None)
    for (pixels, text), index in zip(batch.items, batch.indices, strict=True):
        assert (pixels.shape, pixels.dtype, text) == ((8, 8, 3), np.uint8, str(index))
        assert pixels[0, 0].tolist() == [index * 10, 0, 0]


def test_samples_are_a_map_style_dataset_with_the_same_order(samples: ShardSamples) -> None:
    share = Share(batch_size=4, rank=1, num_ranks=2, stop=NUM_SAMPLES)
    sampler = StepIndices(SampleOrder(samples.data_version, 7, NUM_SAMPLES), share)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=list, num_workers=2)  # type: ignore[arg-type]
    found = [[int(sample.caption) for sample in batch] for batch in loader]
    assert found == [batch.items for batch in batches(samples, share)]
    assert len(loader) == len(found) == 3


def test_copies_in_other_processes_are_independent(samples: ShardSamples) -> None:
    expected = [sample.caption for sample in samples[:]]
    copy = pickle.loads(pickle.dumps(samples))
    assert [sample.caption for sample in copy[:]] == expected
    child = os.fork()
    if child == 0:
        for _ in range(20):
            for index in range(NUM_SAMPLES):
                _ = samples[index]
        os._exit(0)
    found = [[sample.caption for sample in samples[:]] for _ in range(20)]
    assert os.waitpid(child, 0)[1] == 0
    assert all(row == expected for row in found)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_skipped_and_listed_and_no_other_moves(tmp_path: Path, num_workers: int) -> None:
    damaged = ShardSamples.of_shards(write_shards(tmp_path, bad=[4], contradicting=[17]))
    stream = ShardStream(damaged, Share(batch_size=4, stop=NUM_SAMPLES), seed=7)
    found = list(DataLoader(stream, batch_size=None, num_workers=num_workers))
    order = stream.order.take(0, NUM_SAMPLES).tolist()
    assert [int(text) for batch in found for _, text in batch.items] == [i for i in order if i not in (4, 17)]
    assert [batch.consumed for batch in found] == [4, 8, 12, 16, 20, 23]
    skipped = {item.name: item.reason for batch in found for item in batch.skipped}
    assert skipped.keys() == {f"{key_of(4)} in shard-00000.tar", f"{key_of(17)} in shard-00001.tar"}
    assert "UnidentifiedImageError" in skipped[f"{key_of(4)} in shard-00000.tar"]
    assert "its JSON has key" in skipped[f"{key_of(17)} in shard-00001.tar"]
    for batch, start in zip(found, range(0, NUM_SAMPLES, 4), strict=True):
        bad = sum(index in (4, 17) for index in order[start : start + 4])
        assert len(batch.skipped) == bad and len(batch.items) == len(order[start : start + 4]) - bad


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_of_bad_samples_is_an_error_with_their_names(tmp_path: Path, num_workers: int) -> None:
    samples = ShardSamples.of_shards(write_shards(tmp_path))
    run = ShardStream(samples, Share(batch_size=4), seed=7).order.take(3, 6).tolist()
    write_shards(tmp_path, bad=run)
    share = Share(batch_size=4, stop=NUM_SAMPLES)
    stream = ShardStream(ShardSamples.of_shards(samples.paths), share, seed=7, max_bad_run=3)
    with pytest.raises(ThroughlineError, match="3 consecutive bad samples: ") as caught:
        list(DataLoader(stream, batch_size=None, num_workers=num_workers))
    assert all(key_of(index) in str(caught.value) for index in run)
    lenient = ShardStream(ShardSamples.of_shards(samples.paths), share, seed=7, max_bad_run=4)
    assert sum(len(batch.skipped) for batch in lenient) == 3


def test_a_missing_shard_stops_at_once(tmp_path: Path) -> None:
    samples = ShardSamples.of_shards(write_shards(tmp_path))
    samples.paths[2].unlink()
    with pytest.raises(ThroughlineError, match=r"shard-00002.tar: no such shard") as caught:
        list(ShardStream(samples, Share(batch_size=4, stop=NUM_SAMPLES), seed=7))
    assert not isinstance(caught.value, BadSampleError)


def test_an_invalid_share_is_rejected() -> None:
    for wrong in ({"batch_size": 0}, {"rank": 2, "num_ranks": 2}, {"consumed": -1}):
        with pytest.raises(ValueError, match="expected at least 1"):
            Share(**{"batch_size": 1, **wrong})
    with pytest.raises(TypeError, match="endless"):
        len(StepIndices(SampleOrder("v", 0, 3), Share(batch_size=1)))
