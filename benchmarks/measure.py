"""What the benchmarks share: made-up embeddings, timing in turns, memory of processes, and a table at the end."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from dynamicrag.evaluation.tables import markdown_table  # noqa: E402


def vectors_like_passages(count: int, width: int, seed: int = 0) -> np.ndarray:
    """float16 [count, width] of length 1: passages spread about 20,000 topics in 200 fields.

    The proportions are such that 38,166 of them of width 384 are as hard for an inverted file of 256 clusters as the
    Factbook's passages under all-MiniLM-L6-v2 with questions about them: recall@50 is .79 against .81 with 16 clusters
    probed, .97 against .96 with 64; 60 effective dimensions against 49.
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
    """float32 [count, width] of length 1, each with a cosine of about .7 to a random vector."""
    rng = np.random.default_rng(seed)
    chosen = vectors[np.sort(rng.choice(len(vectors), count, replace=len(vectors) < count))].astype(np.float32)
    asked = chosen + _directions(rng, count, vectors.shape[1])
    return asked / np.linalg.norm(asked, axis=1, keepdims=True)


def _directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Random vectors of length about 1, whose variance falls from dimension to dimension as it does in sentence encoders."""
    spread = np.arange(1, width + 1, dtype=np.float32) ** -0.42
    return spread / np.linalg.norm(spread) * rng.standard_normal((count, width), dtype=np.float32)


def in_turns(systems: dict[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, float]:
    """Seconds each system takes for one unit of work (median over rounds). Each returns how many units one call does.

    They take turns, so that a slow minute of the machine is a slow minute for all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + warm_up):
        for name, work in systems.items():
            began = time.perf_counter()
            units = work()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - began) / units)
    return {name: statistics.median(values) for name, values in seconds.items()}


def encoder_alone(encoder: Callable, lengths: list[int], batch_tokens: int, device: str) -> float:
    """The limit: an encoder over a full batch at each of ten lengths, nothing padded. Returns documents of mean length."""
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
    """GB over processes and their children: `proportional` counts a page that n of them map as 1/n each, `anonymous` is no file."""
    total = {"proportional": 0.0, "resident": 0.0, "anonymous": 0.0}
    for pid in {child for process in processes for child in _tree(process)}:
        try:
            fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        except (OSError, ValueError):  # it has just ended
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
    """Run commands at once; the highest sum of each kind of memory over all of them (GB), and the seconds they took."""
    began = time.perf_counter()
    running = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE) for command in commands]
    peak = {"proportional": 0.0, "resident": 0.0, "anonymous": 0.0}
    while any(process.poll() is None for process in running):
        now = memory_of([process.pid for process in running])
        peak = {name: max(peak[name], now[name]) for name in peak}
        time.sleep(0.1)
    for process in running:
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return peak, time.perf_counter() - began


def report(title: str, header: list[str], rows: list[list[str]], figures: dict, output: str | None) -> None:
    """Print a table to standard output, and add its figures to a JSON file."""
    print(f"\n{title} ({os.cpu_count()} cores, {platform.machine()})\n\n{markdown_table(header, rows)}", flush=True)
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, title: figures}, indent=2) + "\n")
