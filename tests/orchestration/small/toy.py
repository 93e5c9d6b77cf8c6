"""A stage that is defined in this one file: every tool must know it from here."""

import json
from collections.abc import Iterator, Sequence

from pipelines.core.config import FrozenConfig
from pipelines.runner.checks import Check, CheckResult, SiblingsCheck
from pipelines.runner.cost import CostInputs, StageEstimate, Workload
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.rows import FoundRow, RowReader, RowSearch
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageRun


class ToyConfig(FrozenConfig):
    num_rows: int = 3


def toy_key(number: int) -> str:
    return f"{1000 + number:032x}"


def produce(run: StageRun[ToyConfig]) -> None:
    keys = [toy_key(number) for number in range(run.config.num_rows)]
    with run.unit("all") as unit:
        unit.drop(keys[0], "first")
        unit.write("keys.json", json.dumps(keys[1:]).encode(), num_rows=len(keys) - 1)
        unit.account(rows_in=len(keys), rows_out=len(keys) - 1)


def find_rows(output: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    for number, key in enumerate(json.loads(output.path("keys.json").read_bytes())):
        if key in search.keys:
            yield FoundRow(key, "keys.json", {"line": number})


def check_not_empty(output: StageOutput) -> CheckResult:
    num_keys = len(json.loads(output.path("keys.json").read_bytes()))
    return CheckResult(num_keys > 0, f"{num_keys} keys", {"num_keys": num_keys})


def check_siblings(outputs: Sequence[StageOutput]) -> CheckResult:
    return CheckResult(len(outputs) == 1, f"{len(outputs)} outputs")


def preview(output: StageOutput, inputs: Inputs) -> str:
    return f"**{output.manifest.stage}** from {sorted(inputs)}"


def cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    return StageEstimate(
        stage=workload.stage,
        rows_in=workload.rows,
        rows_out=workload.rows,
        bytes_in=workload.rows * inputs.assumed("row_bytes"),
        bytes_out=workload.rows * inputs.assumed("row_bytes"),
        seconds=workload.rows / workload.num_runs,
        nodes=workload.num_runs,
        limit="one process",
    )


STAGE = Stage(
    name="toy",
    code_version="1",
    config_type=ToyConfig,
    produce=produce,
    description="A few keys.",
    rows=RowReader(find_rows),
    checks=(
        Check(name="not_empty", description="There are keys.", function=check_not_empty),
        SiblingsCheck(name="alone", description="There is one output.", function=check_siblings),
    ),
    preview=preview,
    funnel_label="Toys kept",
    cost=cost,
)
