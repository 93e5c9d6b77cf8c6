"""Every promise of README and docs has a proof that exists and runs."""

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "promises.md"
RESULTS = "tests/benchmarks/results/"


@dataclass(frozen=True)
class Promise:
    """One row of the page's tables."""

    text: str
    proofs: tuple[str, ...]
    scale: str


def read_promises(page: str) -> list[Promise]:
    """Return the rows of all tables with the columns promise, proof, tried."""
    promises = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[0] == "promise" or set(cells[0]) <= {"-", ":"}:
            continue
        promises.append(Promise(cells[0], tuple(re.findall(r"`(tests/[^`]+)`", cells[1])), cells[2]))
    return promises


PROMISES = read_promises(PAGE.read_text())


@cache
def _tests_in(path: Path) -> frozenset[str]:
    """Return the names of a file's tests that pytest would collect and not skip outright."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            marks = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if "mark.skip(" not in marks and "mark.xfail" not in marks:
                names.add(node.name)
    return frozenset(names)


def missing_proof(proof: str) -> str | None:
    """Return why a proof doesn't count, or None if it does."""
    if proof.startswith(RESULTS):
        if not re.match(r"\d{4}-\d{2}-\d{2}-\w+\.json$", proof.removeprefix(RESULTS)):
            return "a results file is named by its date"
        if not (ROOT / proof).is_file():
            return "no such results file"
        return None if json.loads((ROOT / proof).read_text()) else "the results file is empty"
    file, _, name = proof.partition("::")
    path = ROOT / file
    if not path.is_file() or not path.name.startswith("test_"):
        return "no such test file"
    return None if name in _tests_in(path) else f"no test {name!r} in it"


def test_the_page_has_promises() -> None:
    assert len(PROMISES) >= 20


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.text[:60])
def test_each_promise_names_a_proof_that_runs_and_how_far_it_was_tried(promise: Promise) -> None:
    assert promise.proofs, "no proof"
    assert {proof: reason for proof in promise.proofs if (reason := missing_proof(proof))} == {}
    assert promise.scale, "say at which scale it was tried"


def test_a_proof_that_is_gone_is_noticed() -> None:
    assert missing_proof("tests/test_promises.py::test_that_nobody_wrote")
    assert missing_proof("tests/benchmarks/results/2026-01-01-nothing.json")
    assert missing_proof("tests/benchmarks/results/undated.json")
    assert read_promises("| promise | proof | tried |\n|---|---|---|\n| x | none | 3 parts |\n")[0].proofs == ()
