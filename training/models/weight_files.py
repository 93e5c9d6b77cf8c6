"""Weights in one safetensors file, or in several with an index.

Names and index are those of the Hugging Face hub: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and
``model.safetensors.index.json``.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput

if TYPE_CHECKING:
    from pipelines.runner.units import Unit

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def split_tensors(tensors: Mapping[str, Tensor], stem: str, max_bytes: int) -> dict[str, list[str]]:
    """Return file name -> names of the tensors in it. A tensor larger than `max_bytes` has a file of its own."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_bytes)
    return {name: list(names) for name, names in split.filename_to_tensors.items()}


def write_weights(unit: "Unit", weights: Mapping[str, Tensor], max_bytes: int) -> None:
    """Write a model's weights as files of a stage's output, with one serialised file in memory at a time."""
    from safetensors.torch import save

    files = split_tensors(weights, WEIGHTS_NAME.removesuffix(".safetensors"), max_bytes)
    for file, names in files.items():
        unit.write(file, save({name: weights[name] for name in names}, metadata={"format": "pt"}))
    if len(files) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        place = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        unit.write(INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")


def read_weights(checkpoint: StageOutput, prefix: str = "") -> dict[str, Tensor]:
    """Return a checkpoint's tensors whose names begin with `prefix`, from one file or several.

    Raises ThroughlineError that names a missing or unreadable file.
    """
    from safetensors import SafetensorError, safe_open

    names_by_file = _files_of(checkpoint)
    weights: dict[str, Tensor] = {}
    for file, names in names_by_file.items():
        path = checkpoint.folder / file
        checkpoint.fetch([file])
        try:
            with safe_open(path, framework="pt") as tensors:
                stored = set(tensors.keys())
                absent = sorted(set(names or ()) - stored)
                if absent:
                    raise _damaged(checkpoint, file, f"tensor {absent[0]} is missing, which {INDEX_NAME} places here")
                wanted = sorted(name for name in stored if name.startswith(prefix))
                weights |= {name: tensors.get_tensor(name) for name in wanted}
        except FileNotFoundError as error:
            raise _damaged(checkpoint, file, f"missing, one of {len(names_by_file)} files of weights") from error
        except (SafetensorError, OSError) as error:
            raise _damaged(checkpoint, file, f"not a readable safetensors file ({error})") from error
    return weights


def _files_of(checkpoint: StageOutput) -> dict[str, list[str] | None]:
    """Return file -> the tensors that the index places there, None without an index."""
    listed = {entry.path for entry in checkpoint.manifest.files}
    if INDEX_NAME not in listed:
        return {checkpoint.manifest.file(WEIGHTS_NAME).path: None}
    try:
        place: dict[str, str] = json.loads(checkpoint.path(INDEX_NAME).read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, INDEX_NAME, f"not a readable index of weights ({error})") from error
    return {file: [name for name in place if place[name] == file] for file in sorted(set(place.values()))}


def _damaged(checkpoint: StageOutput, file: str, problem: str) -> ThroughlineError:
    stage = f"{checkpoint.manifest.stage} {checkpoint.manifest.partition or ''}".rstrip()
    return ThroughlineError(f"{checkpoint.folder / file}: {problem}; re-run {stage}")
