"""The stage `checkpoint` in one process: its files, its record, reuse, and errors."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from tests.training.conftest import TINY_MODEL, TinyData
from training.config import Strategy
from training.loop.checkpoint import STAGE
from training.models.saved_model import load_model

pytestmark = pytest.mark.slow


def run(data: TinyData, root: Path, strategy: Strategy = Strategy.STATIC, **training: object) -> StageOutput:
    return STAGE.run(data.config(strategy, **training), data.inputs, root, strategy.value)


def metrics(output: StageOutput) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.path("metrics.jsonl").read_text().splitlines()]


def flat(row: dict[str, Any]) -> dict[str, float]:
    """Flatten a row's lists for pytest.approx; null becomes -1."""
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    opened = {f"{name}.{place}": item for name, items in lists.items() for place, item in enumerate(items)}
    values = {name: value for name, value in row.items() if name not in lists} | opened
    return {name: -1.0 if value is None else value for name, value in values.items()}


@pytest.fixture(scope="module")
def outputs(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[Strategy, StageOutput]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    return {strategy: run(tiny_data, root, strategy) for strategy in Strategy}


def test_all_strategies_consume_the_same_samples_in_the_same_order(outputs: dict[Strategy, StageOutput]) -> None:
    assert len({output.manifest.summary["consumption_digest"] for output in outputs.values()}) == 1
    ledgers = [output.path("ledger.parquet").read_bytes() for output in outputs.values()]
    assert len(set(ledgers)) == 1


def test_all_strategies_start_from_the_same_loss(outputs: dict[Strategy, StageOutput]) -> None:
    # The output projection starts at zero, so the first loss is that of predicting nothing: equal noise, equal loss.
    assert len({output.manifest.summary["first_loss"] for output in outputs.values()}) == 1
    assert len({output.manifest.summary["final_loss"] for output in outputs.values()}) > 3


def test_ledger_names_first_step_and_times_seen(outputs: dict[Strategy, StageOutput]) -> None:
    summary = outputs[Strategy.STATIC].manifest.summary
    table = pq.read_table(outputs[Strategy.STATIC].path("ledger.parquet")).to_pydict()
    assert sum(table["times_seen"]) == summary["num_samples_seen"] == 6 * 8
    assert min(table["first_step"]) == 0
    assert max(table["first_step"]) == 2  # 17 samples in batches of 8 are all seen within three steps
    assert len(table["sample_key"]) == summary["num_distinct_samples"] == 17
    assert set(table["times_seen"]) == {2, 3}


def test_metrics_hold_a_row_for_each_step(outputs: dict[Strategy, StageOutput]) -> None:
    rows = metrics(outputs[Strategy.JOINT])
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 5]
    assert rows[0]["learning_rate"] == pytest.approx(1e-3)
    assert rows[5]["learning_rate"] == pytest.approx(2e-3)


def test_losses_are_summed_by_flow_time(outputs: dict[Strategy, StageOutput]) -> None:
    for row in metrics(outputs[Strategy.JOINT]):
        assert sum(row["t_bucket_counts"]) == 8
        assert sum(row["t_bucket_loss_sums"]) == pytest.approx(8 * row["loss"], rel=1e-4)
    # Four held-out samples at t = 1/8, 3/8, 5/8, 7/8.
    by_t = metrics(outputs[Strategy.JOINT])[5]["validation_loss_by_t"]
    assert [place for place, loss in enumerate(by_t) if loss is not None] == [1, 3, 6, 8]
    mean = sum(loss for loss in by_t if loss is not None) / 4
    assert mean == pytest.approx(metrics(outputs[Strategy.JOINT])[5]["validation_loss"], rel=1e-4)


def test_rates_and_memory_are_measured_outside_the_result(outputs: dict[Strategy, StageOutput]) -> None:
    output = outputs[Strategy.STATIC]
    measured = output.manifest.measurements
    assert measured["images_per_second"] > 0
    assert measured["peak_memory_bytes"] > 10 << 20
    assert measured["model_flops_per_step"] > 8 * 6 * 2 * 16 * 24 * 48  # more than one matrix of one block
    assert measured["model_flops_utilisation"] is None  # the peak of this CPU is unknown
    folder = Path(measured["tensorboard_folder"])
    assert folder.parent == output.folder.parent / "logs"
    assert b"loss_by_t/0.5-0.6" in b"".join(path.read_bytes() for path in folder.iterdir())


def test_utilisation_is_relative_to_the_configured_peak(tiny_data: TinyData, tmp_path: Path) -> None:
    measured = run(tiny_data, tmp_path, peak_flops=1e9, log_every=2).manifest.measurements
    assert measured["model_flops_utilisation"] == pytest.approx(measured["model_flops_per_second"] / 1e9, abs=1e-4)


def test_saved_model_loads_with_its_configuration(outputs: dict[Strategy, StageOutput], tiny_data: TinyData) -> None:
    for strategy, output in outputs.items():
        saved = load_model(output, tiny_data.llm)
        assert saved.strategy is strategy
        assert saved.config == TINY_MODEL
        assert sum(p.numel() for p in saved.model.parameters()) == output.manifest.summary["num_parameters"]


def test_training_lowers_the_loss(tiny_data: TinyData, tmp_path: Path) -> None:
    rows = metrics(run(tiny_data, tmp_path, Strategy.DEPTH_WISE, steps=60, validate_every=60))
    assert sum(row["loss"] for row in rows[-10:]) < 0.9 * sum(row["loss"] for row in rows[:10])
    assert rows[-1]["validation_loss"] < rows[0]["loss"]


def test_a_second_run_is_reused_and_a_fresh_one_agrees(
    outputs: dict[Strategy, StageOutput], tiny_data: TinyData, tmp_path: Path
) -> None:
    first = outputs[Strategy.TIME_WISE]
    again = run(tiny_data, first.folder.parent.parent, Strategy.TIME_WISE)
    assert again.manifest.environment == first.manifest.environment
    fresh = run(tiny_data, tmp_path, Strategy.TIME_WISE)
    assert fresh.data_version == first.data_version


def test_execution_fields_do_not_change_the_result(
    outputs: dict[Strategy, StageOutput], tiny_data: TinyData, tmp_path: Path
) -> None:
    other = run(tiny_data, tmp_path, Strategy.FUSE_DIT, checkpoint_every=1, keep_checkpoints=1, text_memory_bytes=0)
    assert other.data_version == outputs[Strategy.FUSE_DIT].data_version


def test_a_finished_run_leaves_no_snapshot(tiny_data: TinyData, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, keep_every=2)
    assert not list(tmp_path.rglob("step-*"))


def test_accumulation_consumes_the_same_samples(
    outputs: dict[Strategy, StageOutput], tiny_data: TinyData, tmp_path: Path
) -> None:
    whole, split = outputs[Strategy.STATIC], run(tiny_data, tmp_path, Strategy.STATIC, accumulation_steps=4)
    assert split.manifest.summary["consumption_digest"] == whole.manifest.summary["consumption_digest"]
    for a, b in zip(metrics(whole), metrics(split), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=2e-4)


def test_captions_are_encoded_where_no_features_are_cached(
    outputs: dict[Strategy, StageOutput], tiny_data: TinyData, tmp_path: Path
) -> None:
    encoded = run(tiny_data.without("text_features"), tmp_path)
    for a, b in zip(metrics(outputs[Strategy.STATIC]), metrics(encoded), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-3)


def test_bfloat16_trains_every_strategy(tiny_data: TinyData, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        for strategy in (Strategy.JOINT, Strategy.FUSE_DIT):
            output = run(tiny_data, tmp_path, strategy, precision="bfloat16", text_dtype="bfloat16")
            weights = load_model(output, tiny_data.llm).model.state_dict()
            assert {weight.dtype for weight in weights.values()} == {torch.float32}
            assert all(weight.isfinite().all() for weight in weights.values())
    finally:
        AcceleratorState._reset_state()


def test_a_loss_that_is_not_finite_names_step_and_samples(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.loop import loop

    original = loop.batch_losses

    def spoiled(model: torch.nn.Module, batch: loop.Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        losses, of_head = original(model, batch)
        if int(batch.sample_indices[3]) == target:
            losses = losses * torch.tensor([1, 1, 1, float("nan"), 1, 1, 1, 1])
        return losses, of_head

    config = tiny_data.config(Strategy.STATIC)
    from training.data.data_order import DataOrder
    from training.data.feature_source import read_splits

    dataset = tiny_data.inputs["dataset"][0]
    split = read_splits(dataset)["train"]
    order = DataOrder(dataset.data_version, config.training.seed, 8, len(split))
    fourth = [int(order.indices(step)[3]) for step in range(config.training.steps)]
    step = next(step for step in range(2, len(fourth)) if fourth[step] not in fourth[:step])
    target = fourth[step]
    monkeypatch.setattr(loop, "batch_losses", spoiled)
    with pytest.raises(ThroughlineError, match=f"step {step}: loss of {split.key(target)} is not finite"):
        run(tiny_data, tmp_path)
    snapshots = list(tmp_path.glob("checkpoint/unfinished/*/scratch/snapshots/step-*"))
    kept = list(range(2, step + 1, 2))[-2:]
    assert sorted(path.name for path in snapshots) == [f"step-{number:09d}" for number in kept]


def test_features_of_another_encoder_are_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_data.config(Strategy.STATIC)
    other = config.model_copy(
        update={"text_encoder": config.text_encoder.model_copy(update={"revision": "sha256:other"})}
    )
    with pytest.raises(ThroughlineError, match="configured for 'sha256:other'"):
        STAGE.run(other, tiny_data.inputs, tmp_path, "static")


def test_features_of_another_template_are_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    other = tiny_data.config(Strategy.STATIC).model_copy(update={"template_version": "released-1"})
    with pytest.raises(ThroughlineError, match="is 'plain-1', training is configured for 'released-1'"):
        STAGE.run(other, tiny_data.inputs, tmp_path, "static")


def test_another_number_of_layers_is_named(tiny_data: TinyData, tmp_path: Path) -> None:
    model = TINY_MODEL.model_copy(update={"num_text_layers": 7})
    config = tiny_data.config(Strategy.STATIC).model_copy(update={"model": model})
    with pytest.raises(ThroughlineError, match="4 layers, the model was built for 7"):
        STAGE.run(config, tiny_data.inputs, tmp_path, "static")


def test_latents_of_another_size_are_named(tiny_data: TinyData, tmp_path: Path) -> None:
    model = TINY_MODEL.model_copy(update={"latent_size": 16})
    config = tiny_data.config(Strategy.STATIC).model_copy(update={"model": model})
    with pytest.raises(ThroughlineError, match=r"latents are \(4, 8, 8\), the model was configured for \(4, 16, 16\)"):
        STAGE.run(config, tiny_data.inputs, tmp_path, "static")


def test_inputs_of_another_dataset_are_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    inputs = dict(tiny_data.inputs) | {"latents": tiny_data.inputs["latents"][:1]}
    with pytest.raises(ThroughlineError, match="latents: the inputs are not the outputs that dataset"):
        STAGE.run(tiny_data.config(Strategy.STATIC), inputs, tmp_path, "static")


def test_a_run_stopped_anywhere_resumes_to_the_same_result(
    outputs: dict[Strategy, StageOutput], tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.loop import loop

    original = loop.train_step

    def stopped(run: loop.TrainingRun, step: int) -> loop.StepResult:
        if step == 5:
            raise KeyboardInterrupt
        return original(run, step)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_data, tmp_path, Strategy.JOINT)
    monkeypatch.undo()
    (rows,) = tmp_path.glob("checkpoint/unfinished/*/scratch/metrics.jsonl")
    with rows.open("ab") as stream:
        stream.write(b'{"step": 4, "lo')  # a kill in the middle of writing the next rows
    resumed = run(tiny_data, tmp_path, Strategy.JOINT)
    assert resumed.manifest.measurements["resumed_at_step"] == 4
    assert resumed.data_version == outputs[Strategy.JOINT].data_version
