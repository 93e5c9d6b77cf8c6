import json
from collections.abc import Callable

import dagster as dg
import pytest

from orchestration.cli.run import Run
from orchestration.console import Console
from orchestration.defs.run_history import refs_of_run
from orchestration.graph.execution import Execution
from orchestration.lineage.audit import Audit, Auditor, find_output
from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.laion.index import entry_of
from pipelines.runner.outputs import StageOutput
from tests.orchestration.conftest import NUMBERS, Recorder, execution_of
from tests.orchestration.small.stages import IndexConfig, SmallProfile

Materialized = Callable[[], Execution]


def _output(execution: Execution, asset: str, partition: str | None = None) -> StageOutput:
    output = execution.plan.task(asset, partition).output
    assert output is not None
    return output


def _audit(execution: Execution) -> Audit:
    return Auditor(execution.plan.output_root).audit([_output(execution, "table").ref])


def _problems(audit: Audit) -> dict[str, list[str]]:
    return {node.label: node.problems for node in audit.nodes.values() if node.problems}


def test_audit_follows_inputs_from_the_last_output_to_the_index(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    audit = _audit(materialize_all())
    assert audit.passed
    assert len(audit.nodes) == 14
    lines = list(audit.lines())
    assert lines[0].startswith("✓ table  ")
    assert any("laion_index" in line for line in lines)
    assert sum("(shown above)" not in line for line in lines) == 14, "each output is expanded once"


def test_a_flipped_byte_is_reported(profile: SmallProfile, materialize_all: Materialized) -> None:
    execution = materialize_all()
    path = _output(execution, "kept", "00001").path("kept.json")
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    audit = _audit(execution)
    assert not audit.passed
    problems = _problems(audit)
    assert list(problems) == ["kept 00001"]
    assert str(path) in problems["kept 00001"][0] and "SHA-256" in problems["kept 00001"][0]
    assert any(line.lstrip("│├└─ ").startswith("✗ kept 00001") for line in audit.lines())


def test_an_altered_manifest_is_reported(profile: SmallProfile, materialize_all: Materialized) -> None:
    execution = materialize_all()
    path = _output(execution, "total").manifest_path
    manifest = json.loads(path.read_bytes())
    manifest["summary"]["total"] += 1
    path.write_text(json.dumps(manifest))
    problems = _problems(_audit(execution))
    assert list(problems) == ["total"]
    assert "was altered" in problems["total"][0]


def test_a_resealed_manifest_does_not_match_the_data_version_of_its_folder(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    """Altering a manifest together with its digest is detected by its readers' references."""
    execution = materialize_all()
    output = _output(execution, "total")
    forged = output.manifest.model_copy(update={"summary": {"total": 0}}).sealed()
    forged.write(output.folder)
    problems = _problems(_audit(execution))
    assert "expected " + output.data_version in problems["total"][0]


def test_a_manifest_whose_inputs_were_reordered_has_another_fingerprint(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    execution = materialize_all()
    output = _output(execution, "total")
    others = tuple(reversed(output.manifest.inputs["kept"]))
    forged = output.manifest.model_copy(update={"inputs": {"kept": others}}).sealed()
    forged.write(output.folder)
    assert any("fingerprint" in problem for problem in _problems(_audit(execution))["total"])


def test_a_missing_input_is_reported(profile: SmallProfile, materialize_all: Materialized) -> None:
    execution = materialize_all()
    _output(execution, "laion_index").manifest_path.unlink()
    problems = _problems(_audit(execution))
    assert set(problems) == {"laion_index", *(f"kept {part}" for part in NUMBERS)}
    assert "no manifest here" in problems["laion_index"][0]
    assert "no sound output of laion_index" in problems["kept 00001"][0]


def test_an_index_with_another_entry_than_the_part_was_made_from_is_reported(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    execution = materialize_all()
    index = _output(execution, "laion_index")
    path = entry_of(index, "00001").address
    path.write_bytes(b"[5, 8]")
    changed = index.manifest.file(path.name).model_copy(update={"sha256": file_sha256(path)})
    files = tuple(changed if entry.path == path.name else entry for entry in index.manifest.files)
    index.manifest.model_copy(update={"files": files}).sealed().write(index.folder)
    problems = _problems(_audit(execution))
    assert set(problems) == {"laion_index", *(f"kept {part}" for part in NUMBERS)}, "a forged index proves nothing"
    assert "00001.part.json" in problems["kept 00001"][0]


@pytest.mark.slow
def test_a_part_made_from_an_older_index_leads_to_the_present_one(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    materialize_all()
    profile.index = IndexConfig(numbers={**NUMBERS, "00003": [40]})
    execution = execution_of(profile)
    for name in ("laion_index", "kept", "total"):
        execution.materialize(name, execution.plan.partitions(name), Recorder())
    audit = Auditor(execution.plan.output_root).audit([_output(execution, "total").ref])
    assert audit.passed
    indexes = [node for node in audit.nodes.values() if node.stage == "laion_index"]
    assert [node.data_version for node in indexes] == [_output(execution, "laion_index").data_version]
    assert [node.inputs["index"] for node in audit.nodes.values() if node.stage == "kept"] == [indexes] * 4


def test_outputs_are_found_by_the_first_digits_of_a_data_version(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    execution = materialize_all()
    output, root = _output(execution, "fit", "uniform"), execution.plan.output_root
    assert find_output(root, output.data_version[:10]) == [output.ref]
    with pytest.raises(ThroughlineError, match="no output under"):
        find_output(root, "ffffffffffffffff")
    with pytest.raises(ThroughlineError, match="at least 4 digits"):
        find_output(root, "f")


@pytest.mark.slow
def test_a_run_is_audited_by_its_id(
    profile: SmallProfile, materialize_all: Materialized, instance: dg.DagsterInstance
) -> None:
    execution = materialize_all()
    Run(execution, instance, Console()).execute("everything", list(execution.plan.graph.nodes.values()))
    run_id = instance.get_runs()[0].run_id
    refs = refs_of_run(profile.home, run_id[:8])
    assert len(refs) == 14 + len(NUMBERS), "the entries of the index are recorded too"
    audit = Auditor(execution.plan.output_root).audit(refs)
    assert audit.passed and len(audit.nodes) == 14
    with pytest.raises(ThroughlineError, match="neither a data version nor the start"):
        refs_of_run(profile.home, "no-such-run")
