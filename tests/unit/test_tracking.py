"""The figures of the stages in a tracker, by stand-ins that write what they are told; no tracker is installed here."""

import json
import sys
from pathlib import Path

import pytest
from conftest import logged, write_jsonl
from stages import row

import evaluate
import evaluate_retrieval
import process_training_data
from dynamicrag.rows import tracking

TOLD = "open('told.jsonl', 'a').write(json.dumps(%s) + chr(10))"
STAND_INS = {
    "wandb": f"""
import contextlib, json, os
@contextlib.contextmanager
def init(**given):
    class Run:
        def log(self, figures): {TOLD % "[given['project'], given['name'], given['dir'], os.environ['WANDB_MODE'], figures, given['config']]"}
    yield Run()
""",
    "trackio": f"""
import json, os
def init(**given):
    globals()['given'] = given
    print("logged to a folder")
def log(figures): {TOLD % "[given['project'], given['name'], os.environ['TRACKIO_DIR'], 'local', figures, given['config']]"}
def finish(): pass
""",
    "mlflow": f"""
import contextlib, json, os
def set_experiment(name): globals()['project'] = name
def start_run(run_name):
    globals()['run'] = run_name
    return contextlib.nullcontext()
def log_params(params): globals()['params'] = params
def log_metrics(figures): {TOLD % "[project, run, os.environ['MLFLOW_TRACKING_URI'], 'local', figures, params]"}
""",
    "tensorboard": "",
}
WRITER = f"""
import json
class SummaryWriter:
    def __init__(self, folder): self.folder, self.figures = folder, {{}}
    def __enter__(self): return self
    def __exit__(self, *error): {TOLD % "['dynamicrag', self.folder.rpartition('/')[2], self.folder, 'local', self.figures, self.text]"}
    def add_scalar(self, name, value, step): self.figures[name] = value
    def add_text(self, name, text, step): self.text = text
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with three rows, and with the stand-ins as the packages of the trackers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "_failed", False)
    for name in ("WANDB_MODE", "WANDB_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI", "TRACKING_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # so that what the module sets is undone
        monkeypatch.delenv(name)
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, text in STAND_INS.items():
        (packages / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (packages / "writer.py").write_text(WRITER)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", __import__("writer"))
    write_jsonl(Path("in.jsonl"), [row(n) for n in range(3)])
    yield tmp_path
    for name in (*STAND_INS, "writer"):
        sys.modules.pop(name, None)


def told() -> list[list]:
    return [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()] if Path("told.jsonl").exists() else []


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_stage_tells_the_figures_of_its_manifest(tracker, here, monkeypatch, capsys):
    monkeypatch.setenv("REPORT_TO", tracker)
    process_training_data.main(["--input_file", "in.jsonl", "--sequence_file", "out/a.jsonl", "--normal_file", "out/b.jsonl", "--seed", "7"])
    [(project, run, place, mode, figures, settings)] = told()
    manifest = json.loads(Path("out/a.jsonl.manifest.json").read_text())
    assert (project, run, mode) == ("dynamicrag", f"{manifest['stage']}-a.jsonl", "offline" if tracker == "wandb" else "local")
    assert str(here / "out/tracking") in place
    assert figures == {**{f"counts/{key}": value for key, value in manifest["counts"].items()}, "seconds": manifest["seconds"]} and len(figures) > 2
    assert (settings["seed"] if isinstance(settings, dict) else settings.split("seed: ")[1][0]) in (7, "7")
    assert capsys.readouterr().out == "", "standard output is the stage's"


def test_scores_are_told_and_no_address(here, monkeypatch):
    monkeypatch.setenv("REPORT_TO", "wandb")
    monkeypatch.setenv("TRACKING_DIR", "elsewhere")
    evaluate.main(["--results_file", "in.jsonl"])
    evaluate_retrieval.main(["--results_file", "in.jsonl"])
    (_, run, place, _, scores, _), (_, other, *_, measures, _) = told()
    assert (run, other) == ("evaluate-in.jsonl.metrics.json", "evaluate_retrieval-in.jsonl.retrieval.json") and place == str(here / "elsewhere")
    summary = json.loads(Path("in.jsonl.metrics.json").read_text())["results"]["in"]
    assert scores["results/in/score"] == summary["score"] and scores["results/in/low"] == summary["low"] and measures
    tracking.track("x", "y", {}, {"api_base": "https://me:secret@host", "seed": 1})
    assert told()[-1][-1] == {"seed": 1}


def test_a_tracker_that_fails_is_a_warning_once_and_no_failure(here, monkeypatch, caplog):
    monkeypatch.setenv("REPORT_TO", "trackio")
    Path("packages/trackio.py").write_text("raise RuntimeError('out of order')")
    for number in (1, 2):
        process_training_data.main(["--input_file", "in.jsonl", "--sequence_file", f"{number}/a.jsonl", "--normal_file", f"{number}/b.jsonl"])
    assert Path("2/a.jsonl.manifest.json").exists() and logged(caplog, "REPORT_TO=trackio", "out of order") == 1


@pytest.mark.parametrize(("name", "told_of"), [("no_such_tracker", "tensorboard"), ("wandb", "pip install wandb")])
def test_a_tracker_that_is_not_there_is_named_with_what_to_do(name, told_of, here, monkeypatch, caplog):
    Path("packages/wandb.py").unlink()
    monkeypatch.setenv("REPORT_TO", name)
    tracking.track("stage", "out.json", {"n": 1}, {})
    assert logged(caplog, f"REPORT_TO={name}", *told_of.split()) == 1


@pytest.mark.parametrize("value", [None, "", "none"])
def test_without_the_setting_nothing_is_told(value, here, monkeypatch):
    monkeypatch.delenv("REPORT_TO", raising=False)
    if value is not None:
        monkeypatch.setenv("REPORT_TO", value)
    tracking.track("stage", "out.json", {"n": 1}, {})
    assert told() == [] and not Path("tracking").exists()


def test_numbers_are_told_and_nothing_else():
    nested = {"a": 1, "b": {"c": 0.5, "d": {"e": -1}}, "f": True, "g": "1", "h": None, "i": [1]}
    assert dict(tracking.numbers_of(nested)) == {"a": 1.0, "b/c": 0.5, "b/d/e": -1.0}
