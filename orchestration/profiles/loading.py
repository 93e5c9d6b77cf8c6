"""Loads profiles: by name, or from a TOML or JSON file based on another, with changes of single fields applied."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestration.profiles.library import PROFILES
from orchestration.profiles.profile import Profile
from pipelines.core.errors import ThroughlineError, os_error_message, problem_in_words


def load_profile(name: str, home: Path, changes: Sequence[str] = ()) -> Profile:
    """Return the profile called `name`, or the one in the TOML or JSON file `name`, with `changes` applied.

    A file names its ``base`` and overrides fields, in tables of the same shape as the profile. A change is
    ``field.field=value``, with the value as JSON or plain text. Raises ThroughlineError that names every wrong field.
    """
    overrides: dict[str, Any] = {}
    if name not in PROFILES:
        base, overrides = _read_profile_file(name)
    else:
        base = name
    for change in changes:
        path, separator, text = change.partition("=")
        if not separator or not path:
            raise ThroughlineError(f"--set {change}: expected field.field=value")
        _set(overrides, path.split("."), _parse(text), change)
    profile = PROFILES[base](home)
    if not overrides:
        return profile
    merged = _merge(profile.model_dump(mode="json"), overrides)
    try:
        return Profile.model_validate(merged)
    except ValidationError as error:
        raise ThroughlineError(f"profile {name}: {_format_errors(error)}") from error


def _read_profile_file(name: str) -> tuple[str, dict[str, Any]]:
    """Return the base and the overrides of a profile file."""
    path, known = Path(name), ", ".join(PROFILES)
    if path.suffix not in {".toml", ".json"}:
        raise ThroughlineError(f"no profile {name!r}; choose one of {known}, or a .toml file")
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ThroughlineError(
            f"{path}: can't be read as a profile: {os_error_message(error)}; name another file, or one of {known}"
        ) from error
    except ValueError as error:
        raise ThroughlineError(f"{path}: can't be read as a profile ({error}); fix that line") from error
    base = content.pop("base", None)
    if base not in PROFILES:
        raise ThroughlineError(f'{path}: base is {base!r}; start the file with base = "<one of {known}>"')
    return base, content


def _set(overrides: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    for name in path[:-1]:
        overrides = overrides.setdefault(name, {})
        if not isinstance(overrides, dict):
            raise ThroughlineError(f"--set {change}: {name} was already set to a plain value")
    overrides[path[-1]] = value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merge(base: Any, overrides: Mapping[str, Any]) -> Any:
    """Return `base` updated with `overrides` at any depth; validation rejects fields that a union's member lacks."""
    if not isinstance(base, dict):
        return dict(overrides)
    merged = dict(base)
    for name, value in overrides.items():
        merged[name] = _merge(base.get(name), value) if isinstance(value, Mapping) else value
    return merged


def _format_errors(error: ValidationError) -> str:
    return "; ".join(map(_format_problem, error.errors()))


def _format_problem(problem: Mapping[str, Any]) -> str:
    path = ".".join(map(str, problem["loc"]))  # empty if fields contradict each other: the message names them
    return f"{path}: {problem_in_words(problem)}" if path else problem_in_words(problem)
