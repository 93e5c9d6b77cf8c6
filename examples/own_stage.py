"""A stage of one's own: units that resume after a kill, rows dropped with a reason, finished outputs reused.

python examples/own_stage.py FOLDER
"""

import json
import sys
from pathlib import Path

from pipelines.core.config import FrozenConfig, execution_field
from pipelines.runner.rows import NO_ROWS
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun


class LengthsConfig(FrozenConfig):
    """Configuration: what changes the result is part of the output's identity, the rest is an `execution_field`."""

    texts: tuple[str, ...]
    max_chars: int = 20
    verbose: bool = execution_field(False)


def produce(run: StageRun[LengthsConfig]) -> StageResult:
    """Write the length of each text; a text that is too long is dropped, and says so."""
    for number, text in enumerate(run.config.texts):
        name = f"text-{number:05d}"
        if run.is_finished(name):  # by an earlier run that was killed
            continue
        with run.unit(name) as unit:
            is_kept = len(text) <= run.config.max_chars
            if is_kept:
                unit.write(f"{name}.json", json.dumps({"text": text, "chars": len(text)}).encode(), num_rows=1)
            else:
                unit.drop(name, "too_long", f"{len(text)} characters")
            unit.account(rows_in=1, rows_out=int(is_kept))
    return StageResult(summary={"num_texts": len(run.config.texts)})


STAGE = Stage(
    name="lengths",
    code_version="1",  # raised by hand when the same inputs would give other bytes
    config_type=LengthsConfig,
    produce=produce,
    description="The length of each text.",
    rows=NO_ROWS,  # no tables with sample keys, so a trace need not search it
    checks=(),
    preview=None,
    funnel_label=None,
    cost=None,
)

config = LengthsConfig(texts=("a cat", "a very long caption about a cat"))
output = STAGE.run(config, {}, Path(sys.argv[1]))
print(f"data version {output.data_version[:12]}: {output.manifest.conservation}")
again = STAGE.run(config.model_copy(update={"verbose": True}), {}, Path(sys.argv[1]))
assert again.folder == output.folder, "a finished output is reused"
