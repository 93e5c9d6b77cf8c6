"""Stage `scores`: a judge model's answers about the samples of one arm and benchmark, and the scores made of them."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.geneval import QUESTIONS_VERSION
from evaluation.benchmarks.prompt_files import EvaluationPrompt
from evaluation.benchmarks.prompt_sets import read_prompts
from evaluation.config import ScoresConfig, parse_partition
from evaluation.judging.checks import SCORE_CHECKS
from evaluation.judging.cost import scores_cost
from evaluation.judging.judges import (
    METRICS,
    JudgeQuestion,
    Score,
    answer_row,
    is_usable,
    judge_questions,
    logprob_words,
    score_image,
)
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit
from recaption.engine import VisionAnswer, VisionRequest
from recaption.ray_pool import engine_pool


def _read_images(samples: StageOutput) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(samples.path("samples.parquet")).to_pylist()
    return sorted(rows, key=lambda row: (row["prompt_id"], row["sample_index"]))


@dataclass(frozen=True)
class _Batch:
    """The images of one unit, with the questions about each of them."""

    name: str
    images: Sequence[Mapping[str, Any]]
    questions: Sequence[Sequence[JudgeQuestion]]

    def requests(self, samples: StageOutput, max_rating_tokens: int) -> list[VisionRequest]:
        """Return one request per question. Reads the images, so call it only when the engine is ready for them."""
        requests: list[VisionRequest] = []
        for image, questions in zip(self.images, self.questions, strict=True):
            image_bytes = samples.path(image["path"]).read_bytes()
            requests += [
                VisionRequest(
                    image_bytes=image_bytes,
                    text=question.text,
                    max_tokens=1 if question.is_yes_no else max_rating_tokens,
                    want_logprobs_of=logprob_words(question),
                )
                for question in questions
            ]
        return requests


def _write_unit(
    unit: Unit,
    batch: _Batch,
    answers: Sequence[VisionAnswer],
    prompts: Mapping[str, EvaluationPrompt],
    config: ScoresConfig,
) -> None:
    """Record a unit's answers and scores; a score that cannot be read is dropped with a reason."""
    remaining = iter(answers)
    answer_rows, score_rows, num_unscored = [], [], 0
    for image, questions in zip(batch.images, batch.questions, strict=True):
        prompt = prompts[image["prompt_id"]]
        own = [next(remaining) for _ in questions]
        answer_rows += [answer_row(image, question, answer) for question, answer in zip(questions, own, strict=True)]
        for score in score_image(prompt, questions, own):
            if is_usable(score):
                score_rows.append(_score_row(image, prompt, score))
            else:
                num_unscored += 1
                key = f"{image['prompt_id']}-{image['sample_index']}|{score.metric}"
                unit.drop(key, score.status, (own[0].error or own[0].text)[:200])
    num_expected = len(score_rows) + num_unscored
    if num_unscored > config.max_unscored_share * num_expected:
        raise ThroughlineError(
            f"scores, unit {unit.name}: {num_unscored} of {num_expected} scores cannot be read from the judge's "
            f"answers, allowed are {config.max_unscored_share:.0%}; check the judge ({config.judge.model.id}) or "
            "raise max_unscored_share"
        )
    unit.account(rows_in=num_expected, rows_out=len(score_rows))
    unit.notes |= {"answers": answer_rows, "scores": score_rows}


def _score_row(image: Mapping[str, Any], prompt: EvaluationPrompt, score: Score) -> dict[str, Any]:
    return {
        "prompt_id": image["prompt_id"],
        "sample_index": image["sample_index"],
        "metric": score.metric,
        "value": score.value,
        "share_yes": score.share_yes,
        "skills": list(prompt.skills),
    }


def _write_tables(run: StageRun[ScoresConfig], answers: list[Any], scores: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, real = pa.string(), pa.float64()
    image = {"prompt_id": text, "sample_index": pa.int32()}
    texts = dict.fromkeys(("kind", "question", "expected", "raw_answer", "finish_reason", "parsed", "error"), text)
    reals = dict.fromkeys(("logprob_yes", "logprob_no", "share_yes"), real)
    answer_schema = pa.schema(image | texts | {"parse_status": text} | reals)
    score_schema = pa.schema(image | {"metric": text, "value": real, "share_yes": real, "skills": pa.list_(text)})
    with run.unit("tables") as unit:
        with unit.open("answers.parquet", num_rows=len(answers)) as stream:
            pq.write_table(pa.Table.from_pylist(answers, schema=answer_schema), stream)
        with unit.open("scores.parquet", num_rows=len(scores)) as stream:
            pq.write_table(pa.Table.from_pylist(scores, schema=score_schema), stream)


def _summary(config: ScoresConfig, benchmark: str, answers: Sequence[Any], scores: Sequence[Any]) -> dict[str, Any]:
    means = {}
    for metric in METRICS[benchmark]:
        values = [row["value"] for row in scores if row["metric"] == metric]
        means[metric] = round(sum(values) / len(values), 6) if values else None
    shares = [row["share_yes"] for row in scores if row["share_yes"] is not None]
    by_kind: dict[str, Counter[str]] = {}
    for row in answers:
        by_kind.setdefault(row["kind"], Counter())[row["parse_status"]] += 1
    return {
        "judge": {"id": config.judge.model.id, "revision": config.judge.model.revision},
        "questions_version": QUESTIONS_VERSION if benchmark == "geneval" else None,
        "means": means,
        "mean_share_yes": round(sum(shares) / len(shares), 6) if shares else None,
        "num_answers": len(answers),
        "num_answers_off_format": sum(row["parsed"] == "other" for row in answers),
        "answers_by_status": {kind: dict(sorted(counts.items())) for kind, counts in sorted(by_kind.items())},
    }


def produce(run: StageRun[ScoresConfig]) -> StageResult:
    """Write ``answers.parquet`` (every raw answer) and ``scores.parquet`` (every score that could be read).

    Inputs: samples of the partition's arm and benchmark, prompt_sets. The rows counted are scores (images x metrics of
    the benchmark); a score that cannot be read is dropped with its status as the reason.
    """
    config = run.config
    _, benchmark = parse_partition(run.partition)
    samples = run.input("samples")
    if samples.manifest.partition != run.partition:
        raise ThroughlineError(
            f"scores {run.partition}: got samples of {samples.manifest.partition}, expected those of {run.partition}"
        )
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(run.input("prompt_sets"), benchmark)}
    images = _read_images(samples)
    unknown = sorted({image["prompt_id"] for image in images} - set(prompts))
    if unknown:
        raise ThroughlineError(
            f"scores {run.partition}: {len(unknown)} prompts of samples are not in prompt_sets ({unknown[0]}, ...); "
            "re-run samples"
        )
    questions = [judge_questions(prompts[image["prompt_id"]]) for image in images]
    size = config.images_per_unit
    batches = [
        _Batch(f"{start // size:05d}", images[start : start + size], questions[start : start + size])
        for start in range(0, len(images), size)
    ]
    pending = {batch.name: batch for batch in batches if not run.is_finished(batch.name)}
    if pending:
        pool = engine_pool(config.judge, config.pool)
        print(f"{run.label}: starting {config.judge.model.id}", file=sys.stderr, flush=True)
        pool.start()
        num_done = len(images) - sum(len(batch.images) for batch in pending.values())
        requests = ((name, batch.requests(samples, config.max_rating_tokens)) for name, batch in pending.items())
        with run.progress(len(images), "images", initial=num_done) as progress:
            for name, answers in pool.answer(requests):
                with run.unit(name) as unit:
                    _write_unit(unit, pending[name], answers, prompts, config)
                progress.advance(len(pending[name].images))
    finished = [unit for unit in run.finished_units() if unit.name != "tables"]
    answers = [row for unit in finished for row in unit.notes["answers"]]
    scores = [row for unit in finished for row in unit.notes["scores"]]
    if not run.is_finished("tables"):
        _write_tables(run, answers, scores)
    return StageResult(summary=_summary(config, benchmark, answers, scores))


STAGE = Stage(
    name="scores",
    code_version="1",
    config_type=ScoresConfig,
    produce=produce,
    description="The judge model's answers about the samples, raw and as scores.",
    rows=DERIVED,
    checks=SCORE_CHECKS,
    preview=None,
    funnel_label=None,
    cost=scores_cost,
)
