"""The command `throughline`. Start-up imports nothing but the standard library; each command brings its own."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.cli import estimate as estimate_command
from orchestration.cli import subset as subset_command
from orchestration.cli import trace as trace_command
from pipelines.core.errors import ThroughlineError, os_error_message

if TYPE_CHECKING:
    from orchestration.graph.execution import Execution
    from orchestration.profiles.profile import Profile

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
_DEFAULT_UI_PORT = 3000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="throughline",
        description="From LAION rows to a trained, judged text-to-image model: one reproducible lineage graph.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser("run", help="compute what is not finished, and show the results")
    _add_profile(run)
    run.add_argument(
        "--select",
        metavar="ASSETS",
        help="assets to bring up to date: name, +name (and what it needs), name+ (and what needs it), group:training; "
        "several with commas. What is not selected must be finished already",
    )
    run.add_argument("--only", choices=("data", "training", "evaluation"), help="one group of assets")

    status = commands.add_parser("status", help="show what is finished, stale or missing")
    _add_profile(status)
    status.add_argument("--all", action="store_true", help="one line per partition")
    status.add_argument("--json", action="store_true", help="as JSON")

    audit = commands.add_parser("audit", help="recompute every digest from a result back to the LAION rows")
    audit.add_argument(
        "run", nargs="?", metavar="RUN_ID",
        help="a Dagster run's id, or a data version, or the first digits of either; default: the report and all "
        "that ends beside it",
    )  # fmt: skip
    _add_profile(audit)
    audit.add_argument("--json", action="store_true", help="as JSON")

    trace = commands.add_parser(
        "trace", help="tell where rows went: outputs that hold them, checkpoints that drew them"
    )
    _add_profile(trace)
    trace_command.add_arguments(trace, withdraws=False)

    withdraw = commands.add_parser(
        "withdraw", help="list rows that must no longer be trained on, and tell where they went"
    )
    _add_profile(withdraw)
    trace_command.add_arguments(withdraw, withdraws=True)

    doctor = commands.add_parser("doctor", help="show what this machine can run, and how to mend what is missing")
    _add_profile(doctor)

    lint = commands.add_parser("lint", help="check a folder of WebDataset tars, of this project or any other")
    lint.add_argument("folder", metavar="DIR", help="searched for .tar, .tar.gz and .tgz at any depth")
    lint.add_argument("--decode", action="store_true", help="decode every image whole; default: its header alone")
    lint.add_argument("--json", action="store_true", help="as JSON")

    profile = commands.add_parser("profile", help="show a profile")
    actions = profile.add_subparsers(dest="action", required=True, metavar="action")
    show = actions.add_parser("show", help="print the whole resolved configuration")
    show.add_argument(
        "name", nargs="?", help="demo, single_gpu, paper, or a TOML file; default: that of the environment"
    )
    show.add_argument("--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE")
    show.add_argument("--json", action="store_true", help="as JSON")

    generate = commands.add_parser("generate", help="draw images of a prompt from finished checkpoints")
    _add_profile(generate)
    generate.add_argument("prompt")
    generate.add_argument(
        "--strategy", action="append", default=[], metavar="NAME",
        help="depth_wise, time_wise+shift, ... or all; may be given several times, and gives one picture side by side",
    )  # fmt: skip
    generate.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="default: the newest of the strategy")
    generate.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num-images", type=int, default=1, metavar="N", help="per strategy")
    generate.add_argument("--steps", type=int, help="default: the profile's, as are the next")
    generate.add_argument("--guidance-scale", type=float)
    generate.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    generate.add_argument("--size", type=int, metavar="PX", help="height and width; default: as in training")

    export = commands.add_parser("export", help="write a finished checkpoint as a folder that diffusers loads")
    _add_profile(export)
    export.add_argument("--strategy", metavar="NAME", help="depth_wise, ...: its newest checkpoint")
    export.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="this one instead")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    export.add_argument(
        "--without-text-encoder", action="store_true", help="name the encoder's hub id and commit instead of saving it"
    )

    params = commands.add_parser("params", help="count the parameters and operations of a profile's models")
    _add_profile(params)
    params.add_argument("--json", action="store_true", help="as JSON")

    estimate = commands.add_parser(
        "estimate", aliases=[estimate_command.OLD_NAME],
        help="estimate rows, bytes, hours and GPUs of every stage before anything runs",
    )  # fmt: skip
    _add_profile(estimate)
    estimate_command.add_arguments(estimate)

    subset = commands.add_parser("subset", help="filter LAION metadata files into a subset, without a profile")
    subset_command.add_arguments(subset)

    ui = commands.add_parser("ui", help="open Dagster's web interface over the outputs")
    _add_profile(ui)
    ui.add_argument(
        "--port", type=int, default=_DEFAULT_UI_PORT, help=f"port on the loopback; default {_DEFAULT_UI_PORT}"
    )
    return parser


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", help="demo, single_gpu, paper, or a TOML file with a base; default: THROUGHLINE_PROFILE, or demo"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE",
        help="change a field of the profile, such as training.steps=50; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--output-root", dest="changes", action="append", type=_output_root, metavar="FOLDER|s3://BUCKET/PREFIX",
        help="where outputs are kept; default: `outputs` under THROUGHLINE_HOME",
    )  # fmt: skip


def _output_root(location: str) -> str:
    """Return the change of a profile that keeps its outputs there."""
    if not location:
        raise ThroughlineError(
            "--output-root '': expected a folder or s3://bucket/prefix, found nothing, as of an unset shell variable; "
            "name one, or leave the option out"
        )
    return f"outputs={json.dumps(location if '://' in location else str(Path(location).absolute()))}"


def _load(name: str | None, changes: Sequence[str]) -> "Profile":
    from orchestration.profiles.loading import load_profile
    from pipelines.core.environment import home_folder, profile_name

    return load_profile(name or profile_name(), home_folder(), changes)


def _execution(arguments: argparse.Namespace) -> "Execution":
    from orchestration.cli.folders import usable_root
    from orchestration.demo_services import service_hooks
    from orchestration.graph.execution import Execution
    from orchestration.graph.nodes import GRAPH
    from orchestration.graph.resolution import Plan
    from pipelines.storage.mirror import store_of

    profile = _load(arguments.profile, arguments.changes)
    root = usable_root(profile)
    store = store_of(root)
    if store is not None:
        store.check()
    return Execution(
        plan=Plan(GRAPH, profile, root),
        log_folder=profile.log_folder,
        hooks=service_hooks(profile),
    )


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.console import Console
    from pipelines.core.environment import home_folder
    from pipelines.storage.mirror import location_of

    execution = _execution(arguments)
    plan, profile = execution.plan, execution.plan.profile
    only = f"group:{arguments.only}" if arguments.only else None
    selection = arguments.select if arguments.select is not None else only
    nodes = list(plan.graph.nodes.values()) if selection is None else plan.graph.select(selection)
    console = Console()
    console.line(f"profile {profile.name}: {len(nodes)} assets, outputs in {location_of(plan.output_root)}")
    for warning in profile.warnings():
        console.line(f"  note: {warning}")

    from orchestration.cli.run import Run, as_json, print_results, summarise
    from orchestration.defs.instance import open_instance
    from orchestration.defs.jobs import EVERYTHING_JOB

    started = time.monotonic()
    with open_instance(home_folder()) as instance:
        run = Run(execution, instance, console)
        run.execute("selected" if selection else EVERYTHING_JOB, nodes)
    console.line(f"  {summarise(run.tallies, time.monotonic() - started)}")
    profile.log_folder.mkdir(parents=True, exist_ok=True)
    (profile.log_folder / "last-run.json").write_text(as_json(run.tallies))
    results = plan.task("results").output if "results" in plan.graph.nodes else None
    if results is not None:
        print_results(console, results, plan.task("report").output)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from orchestration.lineage.status import status_json, status_lines

    plan = _execution(arguments).plan
    for warning in plan.profile.warnings():
        print(f"note: {warning}", file=sys.stderr)
    if arguments.json:
        _print_json(status_json(plan))
    else:
        for line in status_lines(plan, each_partition=arguments.all):
            print(line)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from orchestration.defs.run_history import refs_of_run
    from orchestration.lineage.audit import Auditor, find_output
    from pipelines.core.environment import home_folder

    plan = _execution(arguments).plan
    if arguments.run is None:
        task = plan.task("report")
        if task.output is None:
            raise ThroughlineError(
                f"the report of profile {plan.profile.name} is not finished; run `throughline run` first, or name a "
                "run or a data version"
            )
        refs = [task.output.ref, *(output.ref for output in plan.finished_ends() if output is not task.output)]
    elif "-" in arguments.run:
        refs = refs_of_run(home_folder(), arguments.run)
    else:
        try:
            refs = find_output(plan.output_root, arguments.run)
        except ThroughlineError:
            refs = refs_of_run(home_folder(), arguments.run)
    audit = Auditor(plan.output_root).audit(refs)
    if arguments.json:
        _print_json(audit.as_json())
    else:
        for line in audit.lines():
            print(line)
        broken = [node for node in audit.nodes.values() if node.problems]
        print()
        if broken:
            print(f"{len(broken)} of {len(audit.nodes)} outputs are not what their manifests say:")
            for node in broken:
                for problem in node.problems:
                    print(f"  {node.label}: {problem}")
            print("mend it with: throughline run --set verify=digest  (it compares every byte and recomputes these)")
        else:
            num_files = sum(node.num_files for node in audit.nodes.values())
            print(f"All {len(audit.nodes)} outputs and {num_files} files are what their manifests say.")
    return 0 if audit.passed else EXIT_FAILED


def _trace(arguments: argparse.Namespace) -> int:
    return trace_command.run_trace(arguments, _execution(arguments).plan)


def _withdraw(arguments: argparse.Namespace) -> int:
    return trace_command.run_withdraw(arguments, _execution(arguments).plan)


def _doctor(arguments: argparse.Namespace) -> int:
    from orchestration.cli.doctor import examine

    return examine(_load(arguments.profile, arguments.changes))


def _lint(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from orchestration.cli.lint import lint

    return 0 if lint(Path(arguments.folder), decode=arguments.decode, as_json=arguments.json) else EXIT_FAILED


def _profile(arguments: argparse.Namespace) -> int:
    profile = _load(arguments.name, arguments.changes)
    if arguments.json:
        _print_json(profile.model_dump(mode="json"))
        return 0
    for line in _flat(profile.model_dump(mode="json"), ""):
        print(line)
    for warning in profile.warnings():
        print(f"note: {warning}", file=sys.stderr)
    return 0


def _flat(value: Any, path: str) -> list[str]:
    """Return nested configuration as ``field.field = value`` lines, in the form that --set takes."""
    if isinstance(value, dict) and value:
        return [line for name, item in value.items() for line in _flat(item, f"{path}.{name}" if path else name)]
    return [f"{path} = {json.dumps(value, ensure_ascii=False)}"]


def _generate(arguments: argparse.Namespace) -> int:
    from orchestration.cli.generate import GenerationRequest, generate, parse_arms

    settings = {"num_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    changes = [f"samples.sampler.{name}={value}" for name, value in settings.items() if value is not None]
    profile = _load(arguments.profile, [*arguments.changes, *changes])
    request = GenerationRequest(
        prompt=arguments.prompt,
        out=arguments.out,
        arms=parse_arms(arguments.strategy, profile),
        profile_argument=arguments.profile,
        checkpoint=arguments.checkpoint,
        seed=arguments.seed,
        num_images=arguments.num_images,
        negative_prompt=arguments.negative_prompt,
        size_px=arguments.size,
    )
    for path in generate(profile, request):
        print(path)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from orchestration.cli.export import export

    folder = export(
        _load(arguments.profile, arguments.changes),
        arguments.out,
        strategy=arguments.strategy,
        checkpoint=arguments.checkpoint,
        save_text_encoder=not arguments.without_text_encoder,
        profile_argument=arguments.profile,
    )
    print(folder)
    return 0


def _params(arguments: argparse.Namespace) -> int:
    from orchestration.cli.params import figure_lines, model_figures

    figures = model_figures(_load(arguments.profile, arguments.changes))
    if arguments.json:
        _print_json(figures)
    else:
        print("\n".join(figure_lines(figures)))
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    estimate_command.warn_of_old_name(arguments.command)
    if arguments.reasons:
        estimate_command.print_reasons()
        return 0
    from orchestration.cli.folders import usable_root

    profile = _load(arguments.profile, arguments.changes)
    usable_root(profile)
    return estimate_command.run_estimate(arguments, profile)


def _ui(arguments: argparse.Namespace) -> int:
    from orchestration.cli.ui import serve

    return serve(_execution(arguments), arguments.profile, arguments.changes, arguments.port)


def _subset(arguments: argparse.Namespace) -> int:
    return subset_command.run_subset(arguments)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


_COMMANDS = {
    "run": _run,
    "status": _status,
    "audit": _audit,
    "trace": _trace,
    "withdraw": _withdraw,
    "doctor": _doctor,
    "lint": _lint,
    "profile": _profile,
    "generate": _generate,
    "export": _export,
    "params": _params,
    "estimate": _estimate,
    estimate_command.OLD_NAME: _estimate,
    "subset": _subset,
    "ui": _ui,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a failure is one sentence on standard error and exit status 1."""
    # A script's background command starts with SIGINT ignored, and Dagster treats SIGTERM as it finds SIGINT: without
    # this such a run could not be stopped by either.
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.default_int_handler)
    try:
        arguments = _parser().parse_args(argv)
        status = _COMMANDS[arguments.command](arguments)
    except ThroughlineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on where it stopped", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        status = EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            raise  # nothing that the user named, so most likely a mistake in here
        sys.exit(
            f"error: {os.fsdecode(error.filename)}: {os_error_message(error)}; mend that and run the same command "
            "again: what is finished is kept"
        )
    sys.exit(status)


if __name__ == "__main__":
    main()
