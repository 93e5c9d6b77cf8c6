"""Checks of a finished `dataset` output."""

from pipelines.runner.checks import Check, CheckResult
from pipelines.runner.outputs import StageOutput


def check_duplicate_keys(dataset: StageOutput) -> CheckResult:
    """Check that no sample key occurs twice in the table of samples."""
    import pyarrow.parquet as pq

    keys = pq.read_table(dataset.path("samples.parquet"), columns=["sample_key"]).column("sample_key")
    num_duplicates = len(keys) - len(keys.unique())
    message = f"{num_duplicates} duplicate sample keys" if num_duplicates else "every sample key is unique"
    return CheckResult(num_duplicates == 0, message, {"num_samples": len(keys), "num_duplicates": num_duplicates})


DUPLICATE_KEYS = Check(name="duplicate_keys", description="Each sample key occurs once.", function=check_duplicate_keys)
