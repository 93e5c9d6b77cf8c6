"""Runs one benchmark with its options, or all that need no GPU, each in a process of its own.

python -m tests.benchmarks [NAME [OPTIONS...]]
"""

import subprocess
import sys
from pathlib import Path

_NOT_BENCHMARKS = ("__init__", "__main__", "model_shape", "record")
_NEED_GPU = ("gpu",)
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT_BENCHMARKS)


def main(arguments: list[str]) -> None:
    """Run the benchmark named first with the options behind it; without a name all but those of GPUs."""
    if arguments and arguments[0] not in NAMES:
        sys.exit(f"no benchmark {arguments[0]!r}; there are {', '.join(NAMES)}")
    for name in arguments[:1] or [name for name in NAMES if name not in _NEED_GPU]:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *arguments[1:]], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
