"""Stage `prompt_sets`: the prompts that every arm is evaluated on, in one table."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.benchmarks.prompt_files import EvaluationPrompt, parse_drawbench, parse_genai_bench, parse_geneval
from evaluation.config import BENCHMARKS, Benchmark, PromptFile, PromptSetsConfig
from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import SourceFile
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import NO_ROWS
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun


def read_prompts(output: StageOutput, benchmark: str | None = None) -> list[EvaluationPrompt]:
    """Return the prompts of a finished prompt_sets output, or only those of one benchmark, in table order.

    Raises ThroughlineError if there are none.
    """
    import pyarrow.parquet as pq

    rows = pq.read_table(output.path("prompts.parquet")).to_pylist()
    prompts = [
        EvaluationPrompt(
            benchmark=row["benchmark"],
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            skills=tuple(row["skills"]),
            metadata=json.loads(row["metadata"]),
        )
        for row in rows
        if benchmark is None or row["benchmark"] == benchmark
    ]
    if not prompts:
        known = ", ".join(sorted({row["benchmark"] for row in rows}))
        raise ThroughlineError(
            f"prompt_sets {output.data_version}: no prompts of benchmark {benchmark!r}, only of {known or 'none'}; "
            "set its file in the configuration of prompt_sets"
        )
    return prompts


def choose_evenly(prompts: Sequence[EvaluationPrompt], limit: int | None) -> list[EvaluationPrompt]:
    """Return at most `limit` prompts in file order, chosen to cover all skills as evenly as possible.

    The files are sorted by task, so their first prompts alone would omit whole tasks. Each step takes the next prompt
    of the skill with the fewest chosen so far; a prompt with several skills counts for all of them.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    by_skill: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        for skill in prompt.skills or ("",):
            by_skill.setdefault(skill, []).append(index)
    counts = dict.fromkeys(by_skill, 0)
    chosen: set[int] = set()
    while len(chosen) < limit:
        unfinished = (name for name, indices in by_skill.items() if any(index not in chosen for index in indices))
        skill = min(unfinished, key=counts.__getitem__)
        index = next(index for index in by_skill[skill] if index not in chosen)
        chosen.add(index)
        for name in prompts[index].skills or ("",):
            counts[name] += 1
    return [prompts[index] for index in sorted(chosen)]


def _verify(file: PromptFile) -> tuple[Path, SourceFile]:
    path = Path(file.path)
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise ThroughlineError(f"{path}: prompt file cannot be read ({error.strerror}); check its path") from error
    if sha256 != file.sha256:
        raise ThroughlineError(
            f"{path}: SHA-256 {sha256[:12]}..., expected {file.sha256[:12]}...; "
            "this is another version of the file: use the pinned one or pin this one"
        )
    return path, SourceFile(name=path.name, sha256=sha256, num_bytes=path.stat().st_size)


def _check_count(file: PromptFile, prompts: Sequence[EvaluationPrompt]) -> None:
    if file.num_prompts is not None and len(prompts) != file.num_prompts:
        raise ThroughlineError(f"{file.path}: {len(prompts)} prompts, expected {file.num_prompts}; check the file")


def _load(config: PromptSetsConfig) -> tuple[dict[Benchmark, list[EvaluationPrompt]], list[SourceFile]]:
    parsers: dict[str, tuple[Sequence[PromptFile | None], Callable[..., list[EvaluationPrompt]]]] = {
        "geneval": ([config.geneval], parse_geneval),
        "genai_bench": ([config.genai_image, config.genai_skills], parse_genai_bench),
        "drawbench": ([config.drawbench], parse_drawbench),
    }
    prompts: dict[Benchmark, list[EvaluationPrompt]] = {}
    sources: list[SourceFile] = []
    for benchmark in BENCHMARKS:
        configured, parse = parsers[benchmark]
        files = [file for file in configured if file is not None]
        if not files:
            continue
        verified = [_verify(file) for file in files]
        prompts[benchmark] = parse(*(path for path, _ in verified))
        _check_count(files[0], prompts[benchmark])
        sources += [source for _, source in verified]
    return prompts, sources


def produce(run: StageRun[PromptSetsConfig]) -> StageResult:
    """Write ``prompts.parquet``: benchmark, prompt_id, prompt, skills (list), metadata (JSON).

    Raises ThroughlineError with file and line of every malformed prompt, or if a file is not the pinned one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    loaded, sources = _load(run.config)
    chosen = {name: choose_evenly(prompts, run.config.limit(name)) for name, prompts in loaded.items()}
    rows = [prompt.as_row() for prompts in chosen.values() for prompt in prompts]
    schema = pa.schema(
        [
            ("benchmark", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("skills", pa.list_(pa.string())),
            ("metadata", pa.string()),
        ]
    )
    with run.unit("prompts") as unit, unit.open("prompts.parquet", num_rows=len(rows)) as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
    counts = {name: len(prompts) for name, prompts in chosen.items()}
    skills = {
        name: dict(sorted(Counter(skill for prompt in prompts for skill in prompt.skills).items()))
        for name, prompts in chosen.items()
    }
    in_files = {name: len(prompts) for name, prompts in loaded.items()}
    return StageResult(
        summary={"num_prompts": counts, "num_prompts_in_files": in_files, "prompts_by_skill": skills}, sources=sources
    )


STAGE = Stage(
    name="prompt_sets",
    code_version="1",
    config_type=PromptSetsConfig,
    produce=produce,
    description="The prompts of GenEval, GenAI-Bench and DrawBench, from files pinned by digest.",
    rows=NO_ROWS,
    checks=(),
    preview=None,
    funnel_label=None,
    cost=None,
)
