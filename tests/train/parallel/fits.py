"""What test_distributed.py runs in two processes: one command after another.

A process for each rank of each command would import torch that many times.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import distributed_cases as cases

from moezoo_train.run.cli import run


def main(folder: Path, commands: list[str]) -> None:
    """Run each command, whose words are a JSON list."""
    for command in commands:
        run(json.loads(command))


if __name__ == "__main__":
    cases.run_program(main)
