"""Stage `captions`: one caption for each image of a part, by a vision-language model.

Input `images`: tables ``images-NNNNN.parquet``. Output: for each a table ``captions-NNNNN.parquet`` in the same row
order, written as soon as its last answer arrives. A killed run resumes with the tables that are not yet written.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation
from pipelines.core.model_prompts import caption_prompt
from pipelines.runner.rows import RowTable
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit
from recaption.checks import CAPTION_QUALITY, EMPTY, caption_flags, count_flags
from recaption.config import CaptionsConfig
from recaption.cost import captions_cost
from recaption.preview import preview_captions

if TYPE_CHECKING:
    from recaption.engine import VisionAnswer, VisionRequest

_PREFIX = "images-"


@dataclass
class _OpenTable:
    """A table that still waits for answers."""

    sample_keys: list[str]
    answers: dict[int, list["VisionAnswer"]] = field(default_factory=dict)
    """Batch number -> answers."""


def produce(run: StageRun[CaptionsConfig]) -> StageResult:
    """Caption every table that has no captions yet."""
    tables = _image_tables(run)
    pending = {name: path for name, path in tables.items() if not run.is_finished(name)}
    measurements = _caption(run, tables, pending) if pending else {}
    return StageResult(
        summary=_summary(run),
        measurements=measurements,
        seeds={"engine": run.config.captioner.seed},
        conservation=None if tables else Conservation(rows_in=0, rows_out=0),
    )


def _image_tables(run: StageRun[CaptionsConfig]) -> dict[str, Path]:
    """Return unit name -> image table."""
    paths = [path for path in run.input("images").files(".parquet") if path.name.startswith(_PREFIX)]
    return {path.stem.removeprefix(_PREFIX): path for path in paths}


def _caption(
    run: StageRun[CaptionsConfig], tables: dict[str, Path], pending: dict[str, Path]
) -> dict[str, float | int]:
    from recaption.ray_pool import engine_pool

    num_rows = {name: _num_rows(path) for name, path in tables.items()}
    num_done = sum(rows for name, rows in num_rows.items() if name not in pending)
    config = run.config
    pool = engine_pool(config.captioner, config.pool)
    print(f"{run.label}: starting {config.captioner.model.id}", file=sys.stderr, flush=True)
    pool.start()
    started = time.monotonic()
    open_tables: dict[str, _OpenTable] = {}
    num_tokens = 0
    with run.progress(sum(num_rows.values()), "captions", initial=num_done) as progress:
        for name in pending:
            if num_rows[name] == 0:
                _write_table(run, name, _OpenTable(sample_keys=[]))
        for (name, number), answers in pool.answer(_batches(config, pending, open_tables)):
            table = open_tables[name]
            table.answers[number] = answers
            num_tokens += sum(answer.num_answer_tokens for answer in answers)
            progress.advance(len(answers))
            if len(table.answers) == math.ceil(len(table.sample_keys) / config.rows_per_batch):
                _write_table(run, name, open_tables.pop(name))
    seconds = time.monotonic() - started
    num_captions = sum(num_rows[name] for name in pending)
    return {
        "num_captions": num_captions,
        "num_caption_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "captions_per_second": round(num_captions / seconds, 3),
    }


def _num_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def _batches(
    config: CaptionsConfig, pending: dict[str, Path], open_tables: dict[str, _OpenTable]
) -> Iterator[tuple[tuple[str, int], list["VisionRequest"]]]:
    """Yield ((table, batch number), requests); a batch never spans two tables."""
    import pyarrow.parquet as pq

    from recaption.engine import VisionRequest

    prompt = caption_prompt(config.prompt_version)
    for name, path in pending.items():
        rows = pq.read_table(path, columns=["sample_key", "image"])
        if not rows.num_rows:
            continue
        open_tables[name] = _OpenTable(sample_keys=rows.column("sample_key").to_pylist())
        for number, start in enumerate(range(0, rows.num_rows, config.rows_per_batch)):
            images = rows.column("image").slice(start, config.rows_per_batch)
            requests = [
                VisionRequest(image_bytes=image, text=prompt, max_tokens=config.max_caption_tokens)
                for image in images.to_pylist()
            ]
            yield (name, number), requests


def _write_table(run: StageRun[CaptionsConfig], name: str, table: _OpenTable) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = run.config
    answers = [answer for number in sorted(table.answers) for answer in table.answers[number]]
    rows: list[dict[str, Any]] = []
    with run.unit(name) as unit:
        _drop_failed(unit, table.sample_keys, answers, config.max_failed_share)
        for sample_key, answer in zip(table.sample_keys, answers, strict=True):
            if answer.error is not None:
                continue
            rows.append(
                {
                    "sample_key": sample_key,
                    "caption": answer.text,
                    "prompt_version": config.prompt_version,
                    "finish_reason": answer.finish_reason,
                    "num_prompt_tokens": answer.num_prompt_tokens,
                    "num_caption_tokens": answer.num_answer_tokens,
                    "flags": caption_flags(answer.text, answer.finish_reason, config.checks),
                }
            )
        schema = pa.schema(
            {
                "sample_key": pa.string(),
                "caption": pa.string(),
                "prompt_version": pa.string(),
                "finish_reason": pa.string(),
                "num_prompt_tokens": pa.int32(),
                "num_caption_tokens": pa.int32(),
                "flags": pa.list_(pa.string()),
            }
        )
        with unit.open(f"captions-{name}.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
        unit.account(rows_in=len(answers), rows_out=len(rows))
        unit.notes["num_captions"] = len(rows)
        unit.notes["num_caption_tokens"] = sum(row["num_caption_tokens"] for row in rows)
        unit.notes["flags"] = count_flags(row["flags"] for row in rows)


def _drop_failed(unit: Unit, sample_keys: list[str], answers: list["VisionAnswer"], max_share: float) -> None:
    failed = [(key, answer.error) for key, answer in zip(sample_keys, answers, strict=True) if answer.error is not None]
    if len(failed) > max_share * len(answers):
        raise ThroughlineError(
            f"captions of images-{unit.name}.parquet: {len(failed)} of {len(answers)} images got no caption, allowed "
            f"are {max_share:.0%}; the first one is {failed[0][0]}: {failed[0][1]}"
        )
    for key, error in failed:
        unit.drop(key, "no_caption", error)


def _summary(run: StageRun[CaptionsConfig]) -> dict[str, Any]:
    units = run.finished_units()
    num_captions = sum(unit.notes["num_captions"] for unit in units)
    num_tokens = sum(unit.notes["num_caption_tokens"] for unit in units)
    flags = {flag: sum(unit.notes["flags"][flag] for unit in units) for flag in count_flags([])}
    return {
        "num_captions": num_captions,
        "mean_caption_tokens": round(num_tokens / num_captions, 3) if num_captions else 0.0,
        "num_flagged": flags,
        "share_empty": round(flags[EMPTY] / num_captions, 6) if num_captions else 0.0,
        "prompt": caption_prompt(run.config.prompt_version),
    }


STAGE = Stage(
    name="captions",
    code_version="1",
    config_type=CaptionsConfig,
    produce=produce,
    description="A dense caption of every image by the vision-language model.",
    rows=RowTable("captions-"),
    checks=(CAPTION_QUALITY,),
    preview=preview_captions,
    funnel_label="Pictures captioned",
    cost=captions_cost,
)
