"""The command `throughline lint`: checks a folder of WebDataset tars and prints its findings."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.cli.options import add_json_argument

if TYPE_CHECKING:
    from pipelines.shards.lint import LintReport


def add_lint_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lint`."""
    parser.add_argument("folder", metavar="DIR", help="searched for .tar, .tar.gz and .tgz at any depth")
    parser.add_argument("--decode", action="store_true", help="decode every image fully; default: only its header")
    add_json_argument(parser)


def run_lint(arguments: argparse.Namespace) -> int:
    """Check a folder of tars and print the findings; return 1 if there are any."""
    from pipelines.core.progress import Progress
    from pipelines.shards.lint import find_shards, lines, lint_folder

    folder = Path(arguments.folder)
    with Progress("lint", len(find_shards(folder)), "shards") as progress:

        def on_shard(report: "LintReport") -> None:
            progress.advance(samples=report.num_samples, findings=len(report.findings))

        report = lint_folder(folder, decode=arguments.decode, on_shard=on_shard)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1))  # ASCII: names in a tar may be no valid text
    else:
        for line in lines(report):
            print(line)
    return 1 if report.findings else 0
