"""The figures of the stages in an experiment tracker, if REPORT_TO names one: wandb, tensorboard, trackio or mlflow.

scripts/training.sh passes the same setting to the trainer. Each output of a stage is a run of the project "dynamicrag".
What is logged stays on this machine, in TRACKING_DIR (default: the folder tracking beside the output), unless the
tracker's own variables (WANDB_MODE, MLFLOW_TRACKING_URI) say otherwise. A failure of the tracker is a warning, once per
process: it never ends a stage.
"""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dynamicrag.stage import log

PROJECT = "dynamicrag"
# Addresses can hold a password.
NOT_TOLD = {"api_base", "judge_base_url"}
_failed = False

Log = Callable[[str, Path, dict[str, float], dict[str, object]], None]


def track(stage: str, output: str | Path, figures: Mapping, settings: Mapping) -> None:
    """Log every number in `figures` (nested keys are joined by "/") and the settings of the run that wrote `output`."""
    global _failed
    name = os.environ.get("REPORT_TO") or "none"
    if name == "none" or _failed:
        return
    try:
        if name not in TRACKERS:
            raise ValueError(f"expected {', '.join(TRACKERS)} or none")
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"the package is missing; install it with: {sys.executable} -m pip install {name}")
        folder = Path(os.environ.get("TRACKING_DIR") or Path(output).absolute().parent / "tracking").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        told = {key: value for key, value in settings.items() if key not in NOT_TOLD}
        with contextlib.redirect_stdout(sys.stderr):  # which the tables of a stage have to themselves
            TRACKERS[name](f"{stage}-{Path(output).name}", folder, dict(numbers_of(figures)), told)
    except Exception as error:  # a tracker may raise anything, and the output is finished
        _failed = True
        log.warning("REPORT_TO=%s: nothing is logged (%s: %s)", name, type(error).__name__, error)


def numbers_of(figures: Mapping, before: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a nested mapping with its keys joined by "/"."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{before}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{key}", float(value)


def _wandb(run: str, folder: Path, figures: dict[str, float], settings: dict[str, object]) -> None:
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb = importlib.import_module("wandb")

    with wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=run, dir=os.environ.get("WANDB_DIR", str(folder)), config=settings) as started:
        started.log(figures)


def _tensorboard(run: str, folder: Path, figures: dict[str, float], settings: dict[str, object]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / run)) as writer:
        for name, value in figures.items():
            writer.add_scalar(name, value, 0)
        writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()), 0)


def _trackio(run: str, folder: Path, figures: dict[str, float], settings: dict[str, object]) -> None:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
    trackio = importlib.import_module("trackio")

    trackio.init(project=PROJECT, name=run, config=settings)
    trackio.log(figures)
    trackio.finish()


def _mlflow(run: str, folder: Path, figures: dict[str, float], settings: dict[str, object]) -> None:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    mlflow = importlib.import_module("mlflow")

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    with mlflow.start_run(run_name=run):
        mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})
        mlflow.log_metrics({re.sub(r"[^\w./: -]", "_", name): value for name, value in figures.items()})  # it refuses other characters


TRACKERS: dict[str, Log] = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio, "mlflow": _mlflow}
