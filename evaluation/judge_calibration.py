"""Owns the trial of the judge on real pictures: does it say Yes to a picture's own caption, and No to another's?

The captions are a model's work, so this measures agreement with the captioner and discrimination, not truth.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.config import JudgeCalibrationConfig
from evaluation.judge_answers import OK, read_yes_no
from pipelines.digest import digest_json
from pipelines.errors import ThroughlineError
from pipelines.protocols import NO, YES, vqascore_question
from pipelines.stage import Stage, StageOutput, StageResult, StageRun, Unit
from recaption.engine import VisionAnswer, VisionRequest
from recaption.ray_pool import engine_pool

OWN = "own"
OTHER = "other"


def _captions(run: StageRun[JudgeCalibrationConfig]) -> dict[str, str]:
    import pyarrow.parquet as pq

    captions: dict[str, str] = {}
    for path in _tables(run.inputs.get("captions", ()), "captions-"):
        table = pq.read_table(path, columns=["sample_key", "caption"])
        captions.update(zip(table["sample_key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    return {key: caption for key, caption in captions.items() if caption.strip()}


def _tables(outputs: Sequence[StageOutput], prefix: str) -> list[Path]:
    return [path for output in outputs for path in output.files(".parquet") if path.name.startswith(prefix)]


def choose_pairs(captions: Mapping[str, str], wanted: int) -> list[tuple[str, str, str]]:
    """Return (sample_key, own caption, other caption) of at most `wanted` pictures, by the digest of their keys.

    The other caption is that of the next chosen picture which is captioned differently. Raises ThroughlineError where
    all captions are the same.
    """
    keys = sorted(captions, key=digest_json)[:wanted]
    pairs = []
    for place, key in enumerate(keys):
        others = (captions[other] for other in keys[place + 1 :] + keys[:place])
        other = next((caption for caption in others if caption != captions[key]), None)
        if other is None:
            raise ThroughlineError(
                f"judge_calibration: all {len(keys)} chosen captions are the same; look at the captions first"
            )
        pairs.append((key, captions[key], other))
    return pairs


def _pictures(run: StageRun[JudgeCalibrationConfig], keys: set[str]) -> dict[str, bytes]:
    import pyarrow.parquet as pq

    found: dict[str, bytes] = {}
    for path in _tables(run.inputs.get("images", ()), "images-"):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["sample_key", "image"]):
            for index, key in enumerate(batch.column("sample_key").to_pylist()):
                if key in keys:
                    found[key] = batch.column("image")[index].as_py()
    return found


def _requests(chunk: Sequence[tuple[str, str, str]], pictures: Mapping[str, bytes]) -> Iterator[VisionRequest]:
    for key, *statements in chunk:
        for statement in statements:
            yield VisionRequest(
                image_bytes=pictures[key],
                text=vqascore_question(statement),
                max_tokens=1,
                want_logprobs_of=(YES, NO),
            )


def _write_unit(unit: Unit, chunk: Sequence[tuple[str, str, str]], answers: Sequence[VisionAnswer]) -> None:
    waiting, rows = iter(answers), []
    for key, *statements in chunk:
        for kind, statement in zip((OWN, OTHER), statements, strict=True):
            answer = next(waiting)
            found = read_yes_no(answer.text, answer.logprobs)
            status = "answer_failed" if answer.error is not None else found.status
            if status != OK:
                unit.drop(f"{key}|{kind}", status, (answer.error or answer.text)[:200])
                continue
            rows.append(
                {
                    "sample_key": key,
                    "kind": kind,
                    "statement": statement,
                    "raw_answer": answer.text,
                    "probability_yes": found.probability_yes,
                    "verdict": found.verdict,
                }
            )
    unit.account(rows_in=2 * len(chunk), rows_out=len(rows))
    unit.notes["rows"] = rows


def area_under_roc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Return the share of (positive, negative) pairs in which the positive is larger; a tie counts half."""
    if not positives or not negatives:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def _summary(rows: Sequence[Mapping[str, Any]], num_images: int) -> dict[str, Any]:
    by_kind = {kind: [row["probability_yes"] for row in rows if row["kind"] == kind] for kind in (OWN, OTHER)}
    right = [row["verdict"] == (row["kind"] == OWN) for row in rows]
    auc = area_under_roc(by_kind[OWN], by_kind[OTHER])

    def mean(values: Sequence[float]) -> float | None:
        return round(sum(values) / len(values), 6) if values else None

    return {
        "num_images": num_images,
        "num_answers": len(rows),
        "accuracy": mean(right),
        "accuracy_own": mean([row["verdict"] for row in rows if row["kind"] == OWN]),
        "accuracy_other": mean([not row["verdict"] for row in rows if row["kind"] == OTHER]),
        "auc": round(auc, 6) if auc is not None else None,
        "mean_probability_own": mean(by_kind[OWN]),
        "mean_probability_other": mean(by_kind[OTHER]),
    }


def produce(run: StageRun[JudgeCalibrationConfig]) -> StageResult:
    """Write ``calibration.parquet``: one row per question that could be read.

    Inputs: images and captions (all parts). Rows are questions: two per chosen picture.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = run.config
    pairs = choose_pairs(_captions(run), config.num_images)
    if not pairs:
        raise ThroughlineError("judge_calibration: no captions among the inputs; run captions first")
    size = config.images_per_unit
    chunks = {f"{start // size:05d}": pairs[start : start + size] for start in range(0, len(pairs), size)}
    todo = {name: chunk for name, chunk in chunks.items() if not run.is_finished(name)}
    if todo:
        pictures = _pictures(run, {key for chunk in todo.values() for key, _, _ in chunk})
        missing = sorted({key for chunk in todo.values() for key, _, _ in chunk} - set(pictures))
        if missing:
            raise ThroughlineError(f"judge_calibration: no picture for the caption of {missing[0]}; give all images")
        pool = engine_pool(config.judge, config.pool)
        print(f"{run.label}: asking {config.judge.model.id}", file=sys.stderr, flush=True)
        pool.start()
        batches = ((name, list(_requests(chunk, pictures))) for name, chunk in todo.items())
        num_done = len(pairs) - sum(len(chunk) for chunk in todo.values())
        with run.progress(len(pairs), "images", initial=num_done) as progress:
            for name, answers in pool.answer(batches):
                with run.unit(name) as unit:
                    _write_unit(unit, todo[name], answers)
                progress.advance(len(todo[name]))
    rows = [row for unit in run.finished_units() if unit.name != "table" for row in unit.notes["rows"]]
    if not run.is_finished("table"):
        schema = pa.schema(
            dict.fromkeys(("sample_key", "kind", "statement", "raw_answer"), pa.string())
            | {"probability_yes": pa.float64(), "verdict": pa.bool_()}
        )
        with run.unit("table") as unit, unit.open("calibration.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
    return StageResult(summary=_summary(rows, len(pairs)))


STAGE = Stage(name="judge_calibration", code_version="1", config_type=JudgeCalibrationConfig, produce=produce)

if __name__ == "__main__":
    from evaluation.judge_calibration import STAGE as stage

    stage.main()
