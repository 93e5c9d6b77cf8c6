"""Stage `results`: the paper's tables 1 and 2 in our own numbers, with intervals and paired differences."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from evaluation.config import BENCHMARKS, ResultsConfig, parse_partition
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import PAPER_ARMS

PAPER_LABEL = "paper, other judge: do not compare absolutes"


def _arm_order(arm: str) -> tuple[int, str]:
    names = [known.name for known in PAPER_ARMS]
    return (names.index(arm) if arm in names else len(names), arm)


def _judge_of(output: StageOutput) -> tuple[str, str]:
    judges = {(model.id, model.revision) for model in output.manifest.models if model.role == "model"}
    if len(judges) != 1:
        raise ThroughlineError(
            f"scores {output.manifest.partition}: expected one judge model in its manifest, found {len(judges)}; "
            "re-run scores"
        )
    return judges.pop()


def _judges(outputs: Sequence[StageOutput]) -> dict[str, dict[str, str]]:
    """Return benchmark -> its judge. Benchmarks may have different judges; the arms of one benchmark may not."""
    judges: dict[str, dict[str, str]] = {}
    for benchmark in BENCHMARKS:
        by_judge: dict[tuple[str, str], list[str]] = {}
        for output in outputs:
            if parse_partition(output.manifest.partition)[1] == benchmark:
                by_judge.setdefault(_judge_of(output), []).append(output.manifest.partition or "")
        if len(by_judge) > 1:
            judged = "; ".join(
                f"{judge}@{revision[:16]}: {', '.join(parts)}" for (judge, revision), parts in by_judge.items()
            )
            raise ThroughlineError(
                f"results: scores of different judges cannot share a table ({judged}); re-run scores with one judge"
            )
        for judge, revision in by_judge:
            judges[benchmark] = {"id": judge, "revision": revision}
    return judges


def _judge_fields(results: dict[str, Any], benchmark: str, prefix: str = "") -> dict[str, str]:
    judge = results["judges"].get(benchmark, {"id": "", "revision": ""})
    return {f"{prefix}judge": judge["id"], f"{prefix}judge_revision": judge["revision"]}


def _read_scores(outputs: Sequence[StageOutput]) -> list[Any]:
    import pyarrow.parquet as pq

    from evaluation.analysis.tables import ScoreRow

    rows = []
    for output in outputs:
        arm, benchmark = parse_partition(output.manifest.partition)
        rows += [
            ScoreRow(arm, benchmark, row["prompt_id"], row["metric"], row["value"], tuple(row["skills"]))
            for row in pq.read_table(output.path("scores.parquet")).to_pylist()
        ]
    return rows


def _unscored(outputs: Sequence[StageOutput]) -> list[dict[str, Any]]:
    result = []
    for output in sorted(outputs, key=lambda item: _partition_order(item.manifest.partition)):
        arm, benchmark = parse_partition(output.manifest.partition)
        conservation = output.manifest.conservation
        if conservation is None:
            raise ThroughlineError(f"scores {arm}|{benchmark}: its manifest has no row counts; re-run scores")
        result.append(
            {
                "arm": arm,
                "benchmark": benchmark,
                "num_scores_wanted": conservation.rows_in,
                "num_scores": conservation.rows_out,
                "unscored": conservation.dropped,
                "num_answers": output.manifest.summary.get("num_answers"),
                "num_answers_off_format": output.manifest.summary.get("num_answers_off_format"),
                "scores": output.data_version,
            }
        )
    return result


def _partition_order(partition: str | None) -> tuple[Any, ...]:
    arm, benchmark = parse_partition(partition)
    return (*_arm_order(arm), BENCHMARKS.index(benchmark))


def _checkpoint_row(output: StageOutput) -> dict[str, Any]:
    return {
        "strategy": output.manifest.partition,
        "checkpoint": output.data_version,
        **{
            name: value
            for name, value in sorted(output.manifest.summary.items())
            if not isinstance(value, (list, dict))
        },
    }


def _csv(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def _cell_fields(prefix: str, cell: dict[str, Any] | None, baseline: str) -> dict[str, Any]:
    difference = (cell or {}).get("difference") or {}
    values = {f"{prefix}": cell and cell["value"], f"{prefix}_low": cell and cell["low"]}
    values |= {f"{prefix}_high": cell and cell["high"], f"{prefix}_num_prompts": cell and cell["num_prompts"]}
    values |= {f"{prefix}_num_images": cell and cell["num_images"]}
    values |= {
        f"{prefix}_minus_{baseline}{suffix}": difference.get(name)
        for suffix, name in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return {name: "" if value is None else value for name, value in values.items()}


def _table_1_csv(table: Sequence[dict[str, Any]], results: dict[str, Any]) -> bytes:
    rows = []
    for row in table:
        fields: dict[str, Any] = {"arm": row["arm"]}
        for prefix, benchmark in (("geneval_", "geneval"), ("genai_", "genai_bench"), ("unified_", "drawbench")):
            fields |= _judge_fields(results, benchmark, prefix)
        for name in ("geneval", "genai", "unified_style", "unified_alignment", "unified_coherence"):
            fields |= _cell_fields(name, row[name], results["baseline"])
        for name, value in (results["paper"]["table_1"].get(row["arm"]) or {}).items():
            fields[f"{name} ({PAPER_LABEL})"] = value
        rows.append(fields)
    names = dict.fromkeys(name for row in rows for name in row)
    return _csv(rows, list(names))


def _table_2_csv(table: Sequence[dict[str, Any]], results: dict[str, Any]) -> bytes:
    rows = []
    for row in table:
        for skill, cell in row.items():
            if skill != "arm":
                fields = {"arm": row["arm"], "skill": skill} | _judge_fields(results, "genai_bench")
                rows.append(fields | _cell_fields("score", cell, results["baseline"]))
    return _csv(rows, list(rows[0])) if rows else b""


def produce(run: StageRun[ResultsConfig]) -> StageResult:
    """Write ``results.json``, ``table1.csv`` and ``table2.csv`` from the scores of all arms and benchmarks.

    Inputs: scores, checkpoint, fusion_analysis (all partitions of each; the last two may be empty). Raises
    ThroughlineError if there are no scores, or a benchmark's scores come from different judges.
    """
    from evaluation.analysis.tables import GENEVAL_TASKS, PAPER_TABLE_1, TABLE_1, TABLE_2, table

    config, scores = run.config, list(run.inputs.get("scores", ()))
    if not scores:
        raise ThroughlineError("results: no scores among the inputs; run samples and scores first")
    judges = _judges(scores)
    rows = _read_scores(scores)
    arms = sorted({parse_partition(item.manifest.partition)[0] for item in scores}, key=_arm_order)
    settings: dict[str, Any] = {
        "baseline": config.baseline,
        "num_resamples": config.num_resamples,
        "confidence": config.confidence,
        "seed": config.seed,
    }
    paper = {
        arm: dict(zip(("geneval", "genai", "unified_style"), values, strict=True))
        for arm, values in PAPER_TABLE_1.items()
        if arm in arms
    }
    results: dict[str, Any] = {
        "judges": judges,
        **settings,
        "metrics": {
            "geneval": "share of images (%) whose every clause the judge answers right (geneval_vqa), mean of tasks",
            "genai": "100 x P(Yes) at the first answer token (VQAScore), mean over prompts that carry a skill",
            "unified_style": "rating from 1 to 5, mean over DrawBench",
        },
        "arms": arms,
        "table_1": table(rows, TABLE_1, arms, **settings),
        "geneval_tasks": table(rows, GENEVAL_TASKS, arms, **settings),
        "table_2": table(rows, TABLE_2, arms, **settings),
        "unscored": _unscored(scores),
        "checkpoints": [
            _checkpoint_row(item)
            for item in sorted(
                run.inputs.get("checkpoint", ()), key=lambda item: _arm_order(item.manifest.partition or "")
            )
        ],
        "fusion": {
            item.manifest.partition or "": dict(item.manifest.summary) for item in run.inputs.get("fusion_analysis", ())
        },
        "paper": {"label": PAPER_LABEL, "table_1": paper},
    }
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with run.unit("results") as unit:
        unit.write("results.json", text.encode())
        unit.write("table1.csv", _table_1_csv(results["table_1"], results), num_rows=len(arms))
        unit.write("table2.csv", _table_2_csv(results["table_2"], results), num_rows=len(arms) * len(TABLE_2))
    summary = {
        "judges": judges,
        "num_arms": len(arms),
        "num_scores_wanted": sum(item["num_scores_wanted"] for item in results["unscored"]),
        "num_scores": sum(item["num_scores"] for item in results["unscored"]),
        "table_1": {
            row["arm"]: {name: cell and cell["value"] for name, cell in row.items() if name != "arm"}
            for row in results["table_1"]
        },
    }
    return StageResult(summary=summary, seeds={"bootstrap": config.seed})


STAGE = Stage(
    name="results",
    code_version="1",
    config_type=ResultsConfig,
    produce=produce,
    description="The paper's tables in this run's own numbers, with bootstrap intervals.",
    rows=DERIVED,
    checks=(),
    preview=None,
    funnel_label=None,
    cost=None,
)
