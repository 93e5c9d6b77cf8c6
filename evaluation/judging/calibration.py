"""Stage `judge_calibration`: how well the judge tells a training image's own caption from another image's.

The captions come from a model, so this measures agreement with the captioner and discrimination, not truth.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.config import JudgeCalibrationConfig
from evaluation.judging.answers import OK, parse_yes_no
from evaluation.judging.caption_tables import caption_tables, even_indices
from evaluation.judging.checks import CALIBRATION
from evaluation.judging.judges import ANSWER_FAILED
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.model_prompts import NO, YES, vqascore_question
from pipelines.laion.block_lists import read_keys
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import FoundRow, RowReader, RowSearch, table_names
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit
from recaption.engine import VisionAnswer, VisionRequest
from recaption.ray_pool import engine_pool

_MAX_TABLES = 64
OWN = "own"
OTHER = "other"


@dataclass(frozen=True)
class _CaptionPair:
    """An image, its own caption, and the caption of another image."""

    sample_key: str
    image_bytes: bytes
    own: str
    other_key: str
    other: str

    def requests(self) -> list[VisionRequest]:
        return [
            VisionRequest(
                image_bytes=self.image_bytes,
                text=vqascore_question(statement),
                max_tokens=1,
                want_logprobs_of=(YES, NO),
            )
            for statement in (self.own, self.other)
        ]


def choose_pairs(captions: Mapping[str, str], limit: int) -> list[tuple[str, str]]:
    """Return (sample_key, key of the other caption) of at most `limit` images, chosen by the digest of their keys.

    The other caption is that of the next chosen image with a different caption. Raises ThroughlineError if all captions
    are equal.
    """
    keys = sorted(captions, key=digest_json)[:limit]
    pairs = []
    for index, key in enumerate(keys):
        others = keys[index + 1 :] + keys[:index]
        other = next((other for other in others if captions[other] != captions[key]), None)
        if other is None:
            raise ThroughlineError(
                f"judge_calibration: all {len(keys)} chosen captions are the same; check the captions first"
            )
        pairs.append((key, other))
    return pairs


def _pairs(run: StageRun[JudgeCalibrationConfig]) -> list[_CaptionPair]:
    """Choose images from at most `_MAX_TABLES` tables, spread evenly over all parts."""
    tables = caption_tables(run.inputs.get("images", ()), run.inputs.get("captions", ()))
    tables = [tables[index] for index in even_indices(len(tables), _MAX_TABLES)]
    withdrawn = read_keys(run.config.withdrawn)
    by_table = [
        {key: text for key, text in table.captions().items() if text.strip() and key not in withdrawn}
        for table in tables
    ]
    captions = {key: text for texts in by_table for key, text in texts.items()}
    if not captions:
        raise ThroughlineError("judge_calibration: no captions among the inputs; run captions first")
    chosen = choose_pairs(captions, run.config.num_images)
    images: dict[str, tuple[str, bytes]] = {}
    for table, texts in zip(tables, by_table, strict=True):
        images |= table.images({key for key, _ in chosen if key in texts})
    return [_CaptionPair(key, images[key][1], captions[key], other, captions[other]) for key, other in chosen]


def _write_unit(unit: Unit, pairs: Sequence[_CaptionPair], answers: Sequence[VisionAnswer]) -> None:
    remaining, rows = iter(answers), []
    for pair in pairs:
        for kind, key, statement in ((OWN, pair.sample_key, pair.own), (OTHER, pair.other_key, pair.other)):
            answer = next(remaining)
            yes_no = parse_yes_no(answer.text, answer.logprobs)
            status = ANSWER_FAILED if answer.error is not None else yes_no.status
            if status != OK:
                unit.drop(f"{pair.sample_key}|{kind}", status, (answer.error or answer.text)[:200])
                continue
            rows.append(
                {
                    "sample_key": pair.sample_key,
                    "kind": kind,
                    "statement_key": key,
                    "statement": statement,
                    "raw_answer": answer.text,
                    "probability_yes": yes_no.probability_yes,
                    "verdict": yes_no.verdict,
                }
            )
    unit.account(rows_in=2 * len(pairs), rows_out=len(rows))
    unit.notes["rows"] = rows


def area_under_roc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Return the share of (positive, negative) pairs in which the positive is larger; ties count half."""
    if not positives or not negatives:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def _summary(rows: Sequence[Mapping[str, Any]], num_images: int) -> dict[str, Any]:
    by_kind = {kind: [row["probability_yes"] for row in rows if row["kind"] == kind] for kind in (OWN, OTHER)}
    correct = [row["verdict"] == (row["kind"] == OWN) for row in rows]
    auc = area_under_roc(by_kind[OWN], by_kind[OTHER])

    def mean(values: Sequence[float]) -> float | None:
        return round(sum(values) / len(values), 6) if values else None

    return {
        "num_images": num_images,
        "num_answers": len(rows),
        "accuracy": mean(correct),
        "accuracy_own": mean([row["verdict"] for row in rows if row["kind"] == OWN]),
        "accuracy_other": mean([not row["verdict"] for row in rows if row["kind"] == OTHER]),
        "auc": round(auc, 6) if auc is not None else None,
        "mean_probability_own": mean(by_kind[OWN]),
        "mean_probability_other": mean(by_kind[OTHER]),
    }


def produce(run: StageRun[JudgeCalibrationConfig]) -> StageResult:
    """Write ``calibration.parquet``: one row per question with a readable answer.

    Inputs: images and captions (all parts). The rows counted are questions: two per chosen image.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = run.config
    pairs = _pairs(run)
    size = config.images_per_unit
    chunks = {f"{start // size:05d}": pairs[start : start + size] for start in range(0, len(pairs), size)}
    pending = {name: chunk for name, chunk in chunks.items() if not run.is_finished(name)}
    if pending:
        pool = engine_pool(config.judge, config.pool)
        print(f"{run.label}: starting {config.judge.model.id}", file=sys.stderr, flush=True)
        pool.start()
        batches = ((name, [item for pair in chunk for item in pair.requests()]) for name, chunk in pending.items())
        num_done = len(pairs) - sum(len(chunk) for chunk in pending.values())
        with run.progress(len(pairs), "images", initial=num_done) as progress:
            for name, answers in pool.answer(batches):
                with run.unit(name) as unit:
                    _write_unit(unit, pending[name], answers)
                progress.advance(len(pending[name]))
    rows = [row for unit in run.finished_units() if unit.name != "table" for row in unit.notes["rows"]]
    if not run.is_finished("table"):
        schema = pa.schema(
            dict.fromkeys(("sample_key", "kind", "statement_key", "statement", "raw_answer"), pa.string())
            | {"probability_yes": pa.float64(), "verdict": pa.bool_()}
        )
        with run.unit("table") as unit, unit.open("calibration.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
    return StageResult(summary=_summary(rows, len(pairs)))


def find_calibration_rows(calibration: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    """Yield the wanted rows: by their image, by their caption shown with another image, or by an unread answer."""
    import pyarrow.parquet as pq

    for name in table_names(calibration, "calibration"):
        for row in pq.read_table(calibration.path(name), columns=["sample_key", "statement_key"]).to_pylist():
            yield from (FoundRow(key, name, {}) for key in {*row.values()} if key in search.keys)
    for name in table_names(calibration, Path(DROPPED_NAME).stem):
        for text in pq.read_table(calibration.path(name), columns=["sample_key"])["sample_key"].to_pylist():
            key = text.partition("|")[0]
            if key in search.keys:
                yield FoundRow(key, name, {})


STAGE = Stage(
    name="judge_calibration",
    code_version="2",
    config_type=JudgeCalibrationConfig,
    produce=produce,
    description="How well the judge distinguishes a training image's own caption from another image's.",
    rows=RowReader(find_calibration_rows),
    checks=(CALIBRATION,),
    preview=None,
    funnel_label=None,
    cost=None,
)
