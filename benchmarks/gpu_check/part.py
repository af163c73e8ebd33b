"""A part of the check: its cases, its figures, and its failures and skipped cases."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 4  # minimum seconds that must remain to start a case


class Skipped(Exception):
    """Raised if a part or case cannot run here; the message is the reason."""


@dataclass
class Run:
    """The context of a part. `until` is the end of its time, in seconds of time.monotonic()."""

    folder: Path  # temporary folder of the part
    dry: bool = False
    until: float = float("inf")
    notes: Path | None = None  # file for figures, written at once, so that a part that reaches its limit keeps them
    wheels: dict[str, str] = field(default_factory=dict)  # folders of installed wheels: "pipeline" and "training"
    figures: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    passed: int = 0

    @property
    def device(self) -> str:
        """Return cpu in a dry run, otherwise cuda. Raises Skipped without a GPU."""
        import torch

        if self.dry:
            return "cpu"
        if not torch.cuda.is_available():
            raise Skipped("torch finds no GPU")
        return "cuda"

    def left(self) -> float:
        return self.until - time.monotonic()

    def note(self, **figures: object) -> None:
        self._keep("figures", figures)

    def case(self, name: str, function: Callable[..., dict | None], *given: object) -> None:
        """Run one case and record the figures that it returns. An exception is recorded, and the next case runs."""
        began = time.monotonic()
        try:
            if self.left() < LEAST_SECONDS:
                raise Skipped("no time left")
            found = function(*given)
            self.passed += 1
            if found:
                self.note(**{name: found})
        except Skipped as reason:
            self._keep("skipped", {name: str(reason)})
        except Exception as error:
            traceback.print_exc()
            self._keep("failures", [f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:600]}"])
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    def _keep(self, kind: str, more: dict | list) -> None:
        kept = getattr(self, kind)
        kept.update(more) if isinstance(more, dict) else kept.extend(more)
        if self.notes:
            with self.notes.open("a") as file:
                file.write(json.dumps({kind: more}, default=str) + "\n")


def needs(*packages: str) -> None:
    """Raise Skipped if a package is missing."""
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        raise Skipped(f"{', '.join(absent)} not installed")


def execute(part: Callable[[Run], None], run: Run) -> dict:
    """Run a part and return its record: status (ok, failed or skipped), figures, failures and skipped cases."""
    began = time.monotonic()
    reason = ""
    try:
        part(run)
    except Skipped as skipped:
        reason = str(skipped)
    except Exception as error:
        traceback.print_exc()
        run._keep("failures", [f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"])
    return record_of(run.figures, run.failures, run.skipped, reason, run.passed, time.monotonic() - began)


def record_of(figures: dict, failures: list[str], skipped: dict, reason: str, passed: int, seconds: float) -> dict:
    unfinished = not passed and not figures
    status = "failed" if failures else "skipped" if reason or (skipped and unfinished) else "ok"
    reason = reason or (next(iter(skipped.values())) if status == "skipped" else "")
    return {"status": status, "seconds": round(seconds, 1), "reason": reason, "failures": failures, "skipped_cases": skipped, "figures": figures}
