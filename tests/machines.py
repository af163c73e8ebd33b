"""Machines with no GPU or several, and what the scripts print about them."""

import os
from pathlib import Path

import pytest
from stages import REPO


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path):
    """machine(GPUS) is the environment of a machine whose nvidia-smi lists as many; settings of a run are in CONFIG."""

    def make(gpus: int | None = None, **environment) -> dict[str, str]:
        listed = "\n".join(map(str, range(gpus or 0)))
        program(tmp_path / "bin/nvidia-smi", "exit 9" if gpus is None else f"echo '{listed}'")
        kept = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "NUM_SHARDS", "SHARDS", "CUDA_DEVICE_ORDER")}
        return {**kept, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CONFIG": str(REPO / "configs/llama3_8b.env"), "WORK": str(tmp_path / "run"), **environment}

    return make


def table(text: str) -> dict[str, list[str]]:
    """The rows of the plan's two tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}
