"""The command `throughline`: dispatches to the module of each command, which it imports only when the command is given.

`throughline --help` imports nothing but the standard library.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pipelines.core.errors import ThroughlineError, os_error_message

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A command's help line, and the functions that declare its arguments and run it."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit status."""


def _command(help_text: str, module: str, add_arguments: str, run: str) -> Command:
    """Return a command whose functions are imported on first use."""

    def function(name: str) -> Callable[[Any], Any]:
        return lambda argument: getattr(import_module(f"orchestration.cli.{module}"), name)(argument)

    return Command(help_text, function(add_arguments), function(run))


COMMANDS: Mapping[str, Command] = {
    "run": _command(
        "compute what is missing or stale, and print the results", "run", "add_run_arguments", "run_assets"
    ),
    "status": _command(
        "show which outputs are finished, stale or missing", "status", "add_status_arguments", "run_status"
    ),
    "audit": _command(
        "verify every digest from a result back to the LAION rows", "status", "add_audit_arguments", "run_audit"
    ),
    "trace": _command(
        "find rows: the outputs that contain them, the checkpoints trained on them",
        "trace", "add_trace_arguments", "run_trace",
    ),
    "withdraw": _command(
        "exclude rows from training, and show where they were used", "trace", "add_withdraw_arguments", "run_withdraw"
    ),
    "doctor": _command(
        "check what this machine can run, and how to fix what is missing",
        "doctor", "add_profile_arguments", "run_doctor",
    ),
    "lint": _command(
        "check a folder of WebDataset tars, from this project or any other", "lint", "add_lint_arguments", "run_lint"
    ),
    "profile": _command("show a profile", "params", "add_profile_show_arguments", "run_profile_show"),
    "generate": _command(
        "generate images for a prompt from finished checkpoints", "generate", "add_generate_arguments", "run_generate"
    ),
    "export": _command(
        "write a finished checkpoint as a folder that diffusers loads",
        "checkpoints", "add_export_arguments", "run_export",
    ),
    "params": _command(
        "count the parameters and operations of a profile's models", "params", "add_params_arguments", "run_params"
    ),
    "estimate": _command(
        "estimate rows, bytes, hours and GPUs of every stage before anything runs",
        "estimate", "add_estimate_arguments", "run_estimate",
    ),
    "plan": _command("the old name of estimate", "estimate", "add_estimate_arguments", "run_plan"),
    "subset": _command(
        "filter LAION metadata files into a subset, without a profile", "subset", "add_arguments", "run_subset"
    ),
    "ui": _command("open Dagster's web interface over the outputs", "ui", "add_ui_arguments", "run_ui"),
}  # fmt: skip


class _Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"throughline {version('throughline')}")
        parser.exit()


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser, in which only `command` has its arguments declared."""
    parser = argparse.ArgumentParser(
        prog="throughline",
        description="From LAION rows to a trained, judged text-to-image model: one reproducible lineage graph.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, item in COMMANDS.items():
        subparser = commands.add_parser(name, help=item.help)
        if name == command:
            item.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a failure is one sentence on standard error and exit status 1."""
    # A script's background command starts with SIGINT ignored, and Dagster treats SIGTERM as it finds SIGINT: without
    # this such a run could not be stopped by either.
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.default_int_handler)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = _parser(words[0] if words else None).parse_args(words)
        status = COMMANDS[arguments.command].run(arguments)
    except ThroughlineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        status = EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            raise  # not about a file that the user named, so most likely a bug
        sys.exit(
            f"error: {os.fsdecode(error.filename)}: {os_error_message(error)}; fix that and run the same command "
            "again: finished outputs are reused"
        )
    sys.exit(status)


if __name__ == "__main__":
    main()
