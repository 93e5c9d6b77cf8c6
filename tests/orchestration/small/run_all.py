"""Runs the small graph as `throughline run` does: ``python -m ... HOME STARTS READY GO``.

Creates the file READY once everything is loaded, then waits for the file GO, so that several processes can start
simultaneously.
"""

import os
import sys
import time
from pathlib import Path

from orchestration.cli.run import Run
from orchestration.console import Console
from orchestration.defs.instance import open_instance
from tests.orchestration.conftest import NUMBERS, execution_of
from tests.orchestration.small.stages import IndexConfig, KeepConfig, SmallProfile


def main(home: Path, starts: str, ready: Path, go: Path) -> None:
    profile = SmallProfile(
        home=home, index=IndexConfig(numbers=NUMBERS), keep=KeepConfig(drop_below=3, starts=starts), batch=1
    )
    execution = execution_of(profile)
    ready.touch()
    parent = os.getppid()
    while not go.exists():
        time.sleep(0.01)
        if os.getppid() != parent:
            sys.exit("the test has ended")
    with open_instance(home) as instance:
        Run(execution, instance, Console()).execute("everything", list(execution.plan.graph.nodes.values()))


if __name__ == "__main__":
    home, starts, ready, go = sys.argv[1:]
    main(Path(home), starts, Path(ready), Path(go))
