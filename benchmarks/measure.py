"""Shared functions of the benchmarks: artificial embeddings, timing in turns, memory of processes, and the result
table.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
PAUSE = 0.1  # seconds before a measurement: a library's threads occupy their cores for a while after its work
sys.path.insert(0, str(REPOSITORY))

from dynamicrag.evaluation.tables import markdown_table  # noqa: E402


def vectors_like_passages(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors, float16 [count, width], like passages about 20,000 topics in 200 fields.

    The proportions are chosen so that 38,166 vectors of width 384 are as difficult for an inverted file of 256 clusters
    as the Factbook's passages with all-MiniLM-L6-v2: recall@50 is 0.79 (Factbook: 0.81) with 16 probed clusters and
    0.97 (0.96) with 64; the number of effective dimensions is 60 (49).
    """
    rng = np.random.default_rng(seed)
    fields = _directions(rng, 200, width)
    topics = 0.5 * np.repeat(fields, 100, axis=0) + 0.5 * _directions(rng, 20_000, width)
    made = np.empty((count, width), dtype=np.float16)
    for start in range(0, count, 50_000):
        stop = min(start + 50_000, count)
        block = topics[rng.integers(0, len(topics), stop - start)] + 0.7 * _directions(rng, stop - start, width)
        made[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made


def questions_about(vectors: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    """Return unit vectors, float32 [count, width], each with a cosine of about 0.7 to a random one of `vectors`."""
    rng = np.random.default_rng(seed)
    chosen = vectors[np.sort(rng.choice(len(vectors), count, replace=len(vectors) < count))].astype(np.float32)
    asked = chosen + _directions(rng, count, vectors.shape[1])
    return asked / np.linalg.norm(asked, axis=1, keepdims=True)


def _directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Return random vectors of length about 1 whose variance decreases by dimension, like in sentence encoders."""
    spread = np.arange(1, width + 1, dtype=np.float32) ** -0.42
    return spread / np.linalg.norm(spread) * rng.standard_normal((count, width), dtype=np.float32)


def in_turns(systems: dict[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, float]:
    """Return the seconds per unit of work of each system (median over rounds). A call returns its number of units.

    The systems take turns, so that a slow phase of the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + warm_up):
        for name, work in systems.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            units = work()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - began) / units)
    return {name: statistics.median(values) for name, values in seconds.items()}


def encoder_alone(encoder: Callable, lengths: list[int], batch_tokens: int, device: str) -> float:
    """Run the encoder on a full batch at each of ten lengths, without padding.

    Returns the number of documents of mean length.
    """
    import torch

    tokens = 0
    with torch.inference_mode():
        for some in np.array_split(np.sort(lengths), 10):
            length = int(some.mean().round())
            ids = torch.randint(5, 1000, (max(batch_tokens // length, 1), length), device=device)
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0].cpu()
            tokens += ids.numel()
    return tokens / np.mean(lengths)


def memory_of(processes: list[int]) -> dict[str, float]:
    """Return the memory of processes and their children in GB.

    `proportional` counts a page that n processes map as 1/n for each; `anonymous` is memory without a file.
    """
    total = {"proportional": 0.0, "resident": 0.0, "anonymous": 0.0}
    for pid in {child for process in processes for child in _tree(process)}:
        try:
            fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        except (OSError, ValueError):  # the process has just ended
            continue
        kilobytes = {name: int(value.split()[0]) for name, value in fields.items()}
        total["proportional"] += kilobytes["Pss"] / 1e6
        total["resident"] += kilobytes["Rss"] / 1e6
        total["anonymous"] += kilobytes["Anonymous"] / 1e6
    return total


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in _tree(int(child)))]


def run_watched(commands: list[list[str]]) -> tuple[dict[str, float], float]:
    """Run commands in parallel. Returns the peak of each kind of memory, summed over all of them (GB), and the seconds."""
    began = time.perf_counter()
    with ExitStack() as opened:  # files, because a pipe that nobody reads would fill up
        logs = [opened.enter_context(tempfile.TemporaryFile()) for _ in commands]
        running = [subprocess.Popen(command, cwd=REPOSITORY, stderr=log) for command, log in zip(commands, logs, strict=True)]
        peak = {"proportional": 0.0, "resident": 0.0, "anonymous": 0.0}
        while any(process.poll() is None for process in running):
            now = memory_of([process.pid for process in running])
            peak = {name: max(peak[name], now[name]) for name in peak}
            time.sleep(0.1)
        for process, log in zip(running, logs, strict=True):
            if process.returncode:
                log.seek(0)
                sys.exit(log.read().decode())
    return peak, time.perf_counter() - began


def watch_peak(process: subprocess.Popen) -> dict[str, float]:
    """Wait for a process; return the peaks of its memory, and what it and its children read and wrote, in MB.

    `peak` is the largest resident memory (VmHWM), `anonymous` the largest part of it without a file (RssAnon), each summed
    over the process and its children.
    """
    peak = {"peak": 0.0, "anonymous": 0.0, "read": 0.0, "written": 0.0}
    while process.poll() is None:
        now = dict.fromkeys(peak, 0.0)
        for pid in _tree(process.pid):
            try:
                status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                asked = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
                kilobytes = [int(status[field].split()[0]) for field in ("VmHWM", "RssAnon")]
            except (OSError, KeyError):  # the process has just ended
                continue
            for name, value in zip(peak, (*(1024 * size for size in kilobytes), int(asked["rchar"]), int(asked["wchar"])), strict=True):
                now[name] += value / 1e6
        peak = {name: max(peak[name], now[name]) for name in peak}
        time.sleep(0.02)
    return peak


def report(title: str, header: list[str], rows: list[list[str]], figures: dict, output: str | None) -> None:
    """Print a table to standard output and add its figures to a JSON file."""
    print(f"\n{title} ({os.cpu_count()} cores, {platform.machine()})\n\n{markdown_table(header, rows)}", flush=True)
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, title: figures}, indent=2) + "\n")
