"""What of an estimate deserves a sentence: what can't be done as configured, and what decides time and space."""

from collections.abc import Iterator

from orchestration.cost.inputs import ProfileInputs
from orchestration.cost.table import bytes_text, count_text, three_digits, time_text
from orchestration.cost.types import RunEstimate
from pipelines.laion.cost import rules_without_assumption

_GIB = 1 << 30
_MANY_EPOCHS = 20


def notes_for(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    """Yield the sentences about the stages shown; the gravest come first."""
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
    if rules and "pass_other" not in inputs.chosen and not _measures_rules(inputs):
        yield (
            f"Nothing is known of what the filters {', '.join(rules)} drop: they count as keeping every row "
            "(--assume pass_other=...)."
        )
    if result.unknown():
        yield f"The time of {', '.join(result.unknown())} is not known and in no sum."


def _measures_rules(inputs: ProfileInputs) -> bool:
    return "pass_rules" in inputs.measured or "pass_rules" in inputs.chosen


def _text(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    text, profile = result.text, inputs.profile
    if not text.stored_bytes.is_known:
        return
    layers, width = profile.model.num_text_layers, profile.model.text_width
    if text.is_stored:
        yield (
            f"Text features take {bytes_text(text.stored_bytes.value)}: {bytes_text(text.sample_bytes.value)} a "
            "caption. Nothing else on disk grows as fast."
        )
        return
    yield (
        f"Training encodes the captions of every batch anew, {time_text(text.encode_seconds.value)} of each strategy's "
        "time, since text_features is unset."
    )
    yield (
        f"Storing text features would take {bytes_text(text.stored_bytes.value)}: {layers} layers of {width:,} values, "
        f"{bytes_text(text.sample_bytes.value)} a caption."
    )


def _memory(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    training, needs = inputs.profile.training, inputs.profile.needs
    held, has = result.training_memory_bytes.value, needs.gpu_memory_gib * _GIB
    if training.device == "cuda" and has and held > has:
        yield (
            f"Weights, gradients, optimizer state and average take {bytes_text(held)} of each GPU's "
            f"{bytes_text(has)} before any activation (training.sharded=true splits them)."
        )


def _disk(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    sums = result.totals()
    wanted, has = sums["bytes_out"].value + sums["scratch_bytes"].value, inputs.profile.needs.disk_gib * _GIB
    if wanted > has:
        yield (
            f"The stages keep {bytes_text(wanted)} at most at one time; the profile says needs.disk_gib = "
            f"{inputs.profile.needs.disk_gib:g}, {bytes_text(has)}."
        )


def _epochs(inputs: ProfileInputs, result: RunEstimate) -> Iterator[str]:
    training, epochs = inputs.profile.training, result.epochs
    if not epochs.is_known:
        return
    seen = count_text(training.steps * training.batch_size)
    said = (
        f"{training.steps:,} steps of {training.batch_size} see {seen} samples, each {three_digits(epochs.value)} times"
    )
    if epochs.value < 1:
        enough = result.rows.value * epochs.value
        yield f"{said}: {count_text(enough)} rows of metadata would be enough for every sample once."
    elif epochs.value > _MANY_EPOCHS:
        yield f"{said}: a small set for so many steps."
    else:
        yield f"{said}."


def _machines(result: RunEstimate) -> Iterator[str]:
    most = result.filtering[-1]
    enough = next(row for row in result.filtering if row.seconds.value == most.seconds.value)
    if enough is most:
        return
    yield (
        f"Filtering takes as long on {most.nodes} machines as on {enough.nodes}: all {count_text(result.parts.value)} "
        "files are worked on at once there, and what is left is compared between files by one process "
        f"({time_text(enough.selection_seconds.value)})."
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
