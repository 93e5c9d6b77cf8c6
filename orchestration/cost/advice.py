"""Warnings and hints for an estimate: what does not fit the machine, and what dominates time and space."""

from collections.abc import Iterator

from orchestration.cost.inputs import ProfileInputs
from orchestration.cost.table import bytes_text, count_text, three_digits, time_text
from orchestration.cost.types import RunEstimate
from pipelines.laion.cost import rules_without_assumption

_GIB = 1 << 30
_MANY_EPOCHS = 20


def notes_for(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    """Yield notes on the stages shown, the most important first."""
    shown = {stage.stage for stage in result.stages}
    if shown & {"text_features", "checkpoint"}:
        yield from _text(inputs, result)
    if "checkpoint" in shown:
        yield from _memory(inputs, result)
        yield from _epochs(inputs, result)
    yield from _disk(inputs, result)
    yield from _slowest(result)
    yield from _machines(result)
    rules = rules_without_assumption(inputs.profile.laion_subset)
    has_selectivity = any(inputs.is_chosen(name) for name in ("pass_other", "pass_rules"))
    if rules and not has_selectivity and "pass_rules" not in inputs.measured:
        yield (
            f"The selectivity of the filters {', '.join(rules)} is unknown; they count as keeping every row "
            "(--assume pass_other=...)."
        )
    if result.unknown():
        yield f"The time of {', '.join(result.unknown())} is unknown and excluded from totals."


def _text(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    text, profile = result.text, inputs.profile
    if not text.stored_bytes.is_known:
        return
    layers, width = profile.model.num_text_layers, profile.model.text_width
    if text.is_stored:
        yield (
            f"Text features take {bytes_text(text.stored_bytes.value)}, {bytes_text(text.sample_bytes.value)} a "
            "caption; no other output grows as fast."
        )
        return
    yield (
        f"Training encodes the captions of every batch, {time_text(text.encode_seconds.value)} of each strategy's "
        "time, because text_features is unset."
    )
    yield (
        f"Storing text features would take {bytes_text(text.stored_bytes.value)}: {layers} layers of {width:,} values, "
        f"{bytes_text(text.sample_bytes.value)} a caption."
    )


def _memory(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    training, needs = inputs.profile.training, inputs.profile.needs
    required, available = result.training_memory_bytes.value, needs.gpu_memory_gib * _GIB
    if training.device == "cuda" and available and required > available:
        yield (
            f"Weights, gradients, optimizer state and average take {bytes_text(required)} of each GPU's "
            f"{bytes_text(available)} before any activation (training.sharded=true splits them)."
        )


def _disk(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    sums = result.totals()
    required, available = sums["bytes_out"].value + sums["scratch_bytes"].value, inputs.profile.needs.disk_gib * _GIB
    if required > available:
        yield (
            f"The stages use up to {bytes_text(required)} of disk at a time; the profile states needs.disk_gib = "
            f"{inputs.profile.needs.disk_gib:g}, {bytes_text(available)}."
        )


def _epochs(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    training, epochs = inputs.profile.training, result.epochs
    if not epochs.is_known:
        return
    seen = count_text(training.steps * training.batch_size)
    summary = (
        f"{training.steps:,} steps of {training.batch_size} see {seen} samples, each {three_digits(epochs.value)} times"
    )
    if epochs.value < 1:
        enough = result.rows.value * epochs.value
        yield f"{summary}: {count_text(enough)} rows of metadata would be enough to see every sample once."
    elif epochs.value > _MANY_EPOCHS:
        yield f"{summary}: a small data set for so many steps."
    else:
        yield f"{summary}."


def _machines(result: RunEstimate) -> Iterator[str]:
    most = result.filtering[-1]
    enough = next(row for row in result.filtering if row.seconds.value == most.seconds.value)
    if enough is most:
        return
    yield (
        f"Filtering takes as long on {most.nodes} machines as on {enough.nodes}, where every file already has a "
        f"process of its own; dedup across files is one process ({time_text(enough.selection_seconds.value)})."
    )


def _slowest(result: RunEstimate) -> Iterator[str]:
    known = [stage for stage in result.stages if stage.seconds.is_known]
    whole = sum(stage.seconds.value for stage in known)
    if len(known) < 2 or not whole:
        return
    by_stage: dict[str, float] = {}
    for stage in known:
        by_stage[stage.stage] = by_stage.get(stage.stage, 0.0) + stage.seconds.value
    name = max(by_stage, key=lambda stage: by_stage[stage])
    limit = next(stage.limit for stage in known if stage.stage == name)
    yield f"{name} takes {by_stage[name] / whole:.0%} of the time ({limit})."
