"""The command `throughline lint`: progress, one line per finding, counts, and the exit status."""

import json
from pathlib import Path

from pipelines.core.progress import Progress
from pipelines.shards.lint import LintReport, find_shards, lines, lint_folder


def lint(folder: Path, *, decode: bool, as_json: bool) -> bool:
    """Check a folder of tars, print what was found, and return whether nothing was."""
    with Progress("lint", len(find_shards(folder)), "shards") as progress:

        def show(report: LintReport) -> None:
            progress.advance(samples=report.num_samples, findings=len(report.findings))

        report = lint_folder(folder, decode=decode, on_shard=show)
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        for line in lines(report):
            print(line)
    return not report.findings
