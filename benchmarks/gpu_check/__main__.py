"""Run the parts of the check, each in its own process with a time limit, within --minutes in total.

Reads    --wheels DIR               wheels to install first, offline: DIR/1 for the pipeline, DIR/2 for training
Writes   OUTPUT/gpu_check.jsonl     one line per part, written at once: name, status, seconds, figures
         OUTPUT/gpu_check.md        a table with the latest line of every part
         OUTPUT/gpu_check.log       the output of the parts

The exit status is 1 if a part failed. A part whose requirements are missing is skipped and named.

    bash scripts/gpu_check.sh --minutes 9
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_check.part import ROOT, Run, execute, record_of

# In order of importance: module, function, and maximum seconds in a check of nine minutes. Later parts may use unused
# time.
PARTS = {
    "versions": ("machine", "versions", 60),
    "tests": ("machine", "tests", 75),
    "fork": ("machine", "fork", 60),
    "exactness": ("search", "exactness", 100),
    "speed": ("search", "speed", 100),
    "encoder": ("encoders", "encoder", 50),
    "reranker": ("encoders", "reranker", 70),
    "bertscore": ("encoders", "bertscore", 40),
    "training": ("training", "training", 170),
    "dpo_memory": ("training", "dpo_memory", 50),
    "vllm": ("engine", "vllm", 90),
}
LEAST = 8  # minimum seconds that must remain to start a part
CLOSING = 6  # seconds reserved for the end of the last part and the table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=9, help="maximum duration of the whole check (9)")
    parser.add_argument("--dry", action="store_true", help="run every part on the CPU in a small size")
    parser.add_argument("--wheels", metavar="DIR", help="folder created by --pack")
    parser.add_argument("--output", metavar="DIR", default="runs/gpu_check", help="folder of the results (runs/gpu_check)")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, help="run only these parts")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--started", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "NOTES"), help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--until", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def install(wheels: Path, into: Path, log) -> dict[str, str]:
    """Install the wheels of DIR/1 and DIR/2 into folders for PYTHONPATH.

    A failure is printed, and parts that need them are skipped.
    """
    folders = {}
    for name, piece in (("pipeline", "1"), ("training", "2")):
        files = sorted(map(str, (wheels / piece).glob("*.whl")))
        if not files:
            print(f"{wheels / piece}: no wheels there", flush=True)
            continue
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check",
                   "--target", str(into / name), *files]
        try:
            status = subprocess.run(command, stdout=log, stderr=log, timeout=90).returncode
        except subprocess.TimeoutExpired:
            status = "its limit"
        if status:
            print(f"installing {wheels / piece} ended with {status}; see gpu_check.log", flush=True)
        folders[name] = str(into / name)
    return folders


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants. torchrun's workers are in process groups of their own."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, ValueError):
        return []
    return [pid, *(below for child in children for below in tree(child))]


def end(process: subprocess.Popen, patience: float = 30) -> None:
    """Kill a process and all its descendants, and wait until none runs: until then they hold their locks and GPU memory.

    The wait ends after `patience` seconds.
    """
    stopped: list[int] = []
    while running := [pid for pid in tree(process.pid) if pid not in stopped]:  # a stopped process starts no other
        for pid in running:
            _signal(pid, signal.SIGSTOP)
        stopped += running
    for pid in stopped:
        _signal(pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + patience
    while any(_runs(pid) for pid in stopped) and time.monotonic() < until:
        time.sleep(0.02)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _runs(pid: int) -> bool:
    """Return whether a process exists that is not a zombie. A zombie holds nothing any more, unless one of its threads still ends."""
    try:
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        return not ended or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def run_part(name: str, limit: float, args, wheels: dict, log) -> dict:
    """Run a part in its own process and return its record.

    A part that reaches its limit keeps the figures recorded so far.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as folder:
        notes = Path(folder) / "notes.jsonl"
        notes.touch()
        environment = {**os.environ, "GPU_CHECK_WHEELS": json.dumps(wheels)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [wheels.get("pipeline"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "gpu_check", "--part", name, str(notes), "--until", str(time.monotonic() + limit - 3), *(["--dry"] if args.dry else [])]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            status = None
        except BaseException:
            end(process)
            raise
        kept = {"figures": {}, "failures": [], "skipped": {}}
        record = None
        for line in notes.read_text().splitlines():
            entry = json.loads(line)
            record = entry.get("record", record)
            for kind, more in entry.items():
                if kind in kept:
                    kept[kind] = kept[kind] | more if isinstance(more, dict) else kept[kind] + more
        if record is None:
            kept["failures"].append(f"it took more than its {limit:.0f} s" if status is None else f"it ended with status {status}")
            record = record_of(kept["figures"], kept["failures"], kept["skipped"], "", 0, 0)
        return {"name": name, **record, "seconds": round(time.monotonic() - began, 1)}


def flattened(figures: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict):
            lines.append(f"{prefix}{key}: " + ", ".join(f"{name} {number}" for name, number in value.items()))
        else:
            lines.append(f"{prefix}{key} {value}")
    return lines


def table(records: list[dict]) -> str:
    from dynamicrag.evaluation.tables import markdown_table

    rows = []
    for record in records:
        said = [*(f"FAILED {failure}" for failure in record["failures"]), *([record["reason"]] if record["reason"] else []),
                *(f"skipped {case}: {reason}" for case, reason in record["skipped_cases"].items()), *flattened(record["figures"])]
        for number, line in enumerate(said or [""]):
            first = (record["name"], record["status"], f"{record['seconds']:.0f}") if number == 0 else ("", "", "")
            rows.append([*first, line.replace("|", "/")[:400]])
    return markdown_table(["part", "status", "s", "figures"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(f"{name:12s} {seconds:4d} s at most" for name, (_, _, seconds) in PARTS.items()))
        return 0
    if args.part:
        return child(args)
    began = time.monotonic() if args.started is None else time.monotonic() - max(time.time() - args.started, 0)
    deadline = began + args.minutes * 60 - CLOSING
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "gpu_check.jsonl"
    newest = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check_wheels_", ignore_cleanup_errors=True) as into, (output / "gpu_check.log").open("a") as log:
        wheels = install(Path(args.wheels), Path(into), log) if args.wheels else {}
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        chosen = args.only or list(PARTS)
        for name in chosen:
            left = deadline - time.monotonic()
            log.write(f"\n======== {name}\n")
            log.flush()
            if left < LEAST:
                record = {"name": name, "status": "skipped", "seconds": 0, "reason": "no time left", "failures": [], "skipped_cases": {}, "figures": {}}
            else:
                try:
                    share = left * PARTS[name][2] / sum(PARTS[other][2] for other in chosen[chosen.index(name) :])
                    limit = left if args.dry else min(max(PARTS[name][2] * args.minutes / 9, share), left)
                    record = run_part(name, limit, args, wheels, log)
                except Exception as error:  # an error in one part does not stop the next one
                    record = {"name": name, "status": "failed", "seconds": 0, "reason": "", "failures": [f"{type(error).__name__}: {error}"],
                              "skipped_cases": {}, "figures": {}}
            newest[name] = record
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{record['status']:8s}{record['seconds']:6.1f} s  {name}  {record['reason']}", *record["failures"], sep="\n         ", flush=True)
    kept = {record["name"]: record for record in map(json.loads, results.read_text().splitlines())}
    shown = table([kept[name] for name in PARTS if name in kept])
    (output / "gpu_check.md").write_text(shown + "\n")
    print(f"\n{table(list(newest.values()))}\n\n{time.monotonic() - began:.0f} s in all", flush=True)
    return int(any(record["status"] == "failed" for record in newest.values()))


def child(args) -> int:
    """Run one part in this process. Its record is the last line of the notes."""
    name, notes = args.part[0], Path(args.part[1])
    module, function, _ = PARTS[name]
    with tempfile.TemporaryDirectory(prefix=f"gpu_check_{name}_", ignore_cleanup_errors=True) as folder:
        run = Run(Path(folder), args.dry, args.until or float("inf"), notes, json.loads(os.environ.get("GPU_CHECK_WHEELS", "{}")))
        record = execute(lambda run: getattr(importlib.import_module(f"gpu_check.{module}"), function)(run), run)
        with notes.open("a") as file:
            file.write(json.dumps({"record": record}, default=str) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
