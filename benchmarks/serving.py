"""Measure the server (serve.py) with many clients at once, against inference.py on the same questions in one batch.

A process with inference.py's functions and the server take turns. In each round, the process answers a part of the
questions in one batch, and then --clients clients send the same questions to the server, with their documents. Every
reply must be there and equal to the batch's: the same documents in the same order, the same answer. With --minutes, the
clients then repeat the questions for that time; some of them go away before their reply. Memory is that of the server and its
children, after each round. The ratio is the median of the rounds.

    python benchmarks/serving.py
    python benchmarks/serving.py --llm_model models/smollm2_135m --input_file runs/demo_default/eval_data/factbook_test.jsonl --minutes 30
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import measure

from dynamicrag.stage import ArgumentParser

DEMO = "runs/demo_default"
SHARE_GONE = 0.05  # of the clients of --minutes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--llm_model", default=f"{DEMO}/DynamicRAG_smollm2_135m")
    parser.add_argument("--template", default="template/smollm2.jinja")
    parser.add_argument("--input_file", help="questions with docs (default: artificial questions)")
    parser.add_argument("--questions", type=int, default=1000, help="number of requests; a shorter file is repeated with other words")
    parser.add_argument("--topn", type=int, default=5, help="documents per question")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4, help="parts of the questions")
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--answer_max_tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--minutes", type=float, default=0, help="repeat the questions for this time, with clients that go away")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def questions(args: argparse.Namespace) -> list[dict]:
    """Return the rows of the input file, or artificial ones. No two have the same prompt."""
    from dynamicrag.rows.records import read_rows

    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"word{rng.randrange(5000)}" for _ in range(words))

    if args.input_file is None:
        return [
            {"id": f"q{number}", "question": f"{text(8)}?", "docs": [{"id": f"d{n}", "title": text(2), "text": text(60)} for n in range(args.topn)]}
            for number in range(args.questions)
        ]
    rows = list(read_rows(args.input_file, ("docs",)))
    turns = [{**row, "id": f"{row['id']}.{turn}", "question": f"({turn}) {row['question']}" if turn else row["question"]}
             for turn in range(-(-args.questions // len(rows))) for row in rows]
    return [{key: row[key] for key in ("id", "question", "dataset") if row.get(key)} | {"docs": row["docs"][: args.topn]} for row in turns[: args.questions]]


def flags_of(args: argparse.Namespace) -> list[str]:
    return ["--llm-model", args.llm_model, "--template", args.template, "--max-model-len", str(args.max_model_len), "--dtype", args.dtype,
            "--answer-max-tokens", str(args.answer_max_tokens)]


_LOADED = []  # the models of the process of inference.py


def one_batch(args: argparse.Namespace, rows: list[dict]) -> tuple[list[dict], float]:
    """Return the rows that inference.py answers in one batch, and the seconds. The model is loaded before the first batch."""
    import inference
    from dynamicrag.llm.options import CallOptions, EngineOptions
    from dynamicrag.llm.requests import load_builders, work_on_fitting
    from dynamicrag.rows.row import fail_unanswered
    from dynamicrag.stage import options_from

    if not _LOADED:
        settings = inference.parse_args(flags_of(args))
        _LOADED.append(load_builders(options_from(settings, EngineOptions), options_from(settings, CallOptions)))
    [builders] = _LOADED
    began = time.perf_counter()
    answered = work_on_fitting(rows, builders, lambda fitting: inference.answer_rows(fitting, builders, "dynamic", args.topn, ""), fail_unanswered)
    return answered, time.perf_counter() - began


def start_server(args: argparse.Namespace, log: Path) -> tuple[subprocess.Popen, str]:
    """Start serve.py, and return its process and address."""
    command = [sys.executable, str(measure.REPOSITORY / "serve.py"), "--port", "0", "--concurrency", str(args.clients), *flags_of(args)]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=measure.REPOSITORY, stderr=file)
    while server.poll() is None:
        if address := re.search(r"serving .* at (http://\S+)", log.read_text()):
            return server, address[1]
        time.sleep(0.2)
    sys.exit(log.read_text())


def as_reply(row: dict) -> dict:
    """Return what the server must reply to a row that inference.py has answered."""
    if "error" in row:
        return {"error": True}
    return {"chosen": row["final_docs"], "answer": row["response"]}


async def ask_all(address: str, rows: list[dict], clients: int, gone: float = 0.0) -> tuple[dict[str, dict], Counter]:
    """Return the replies by id of the question, and how often each status came. A client that gets 429 waits and asks again.

    The share `gone` of the requests is given up within half a second.
    """
    import aiohttp

    replies: dict[str, dict] = {}
    statuses, waiting, rng = Counter(), iter(rows), random.Random(1)

    async def client(session: aiohttp.ClientSession) -> None:
        for row in waiting:
            body = {key: row[key] for key in ("id", "question", "dataset") if key in row} | {"documents": row["docs"]}
            patience = aiohttp.ClientTimeout(total=rng.random() * 0.5 if rng.random() < gone else None)
            try:
                while True:
                    async with session.post(f"{address}/v1/answer", json=body, timeout=patience) as reply:
                        content = await reply.json()
                    statuses[str(reply.status)] += 1
                    if reply.status != 429:
                        break
                    await asyncio.sleep(float(reply.headers["Retry-After"]))
            except TimeoutError:
                statuses["gone"] += 1
                continue
            replies[row["id"]] = (
                {"chosen": [doc["id"] for doc in content["chosen"]], "answer": content["answer"]} if reply.status == 200 else {"error": reply.status == 502}
            )

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return replies, statuses


def main() -> None:
    args = parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # a bar of vLLM's would be timed too
    rows = questions(args)
    rounds = [rows[start :: args.rounds] for start in range(args.rounds)]
    warm_up = [{**row, "question": f"warm {row['question']}"} for row in rows[:8]]
    expected, replies, statuses, memory = {}, {}, Counter(), []
    batch, served = [], []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as alone:
        alone.submit(one_batch, args, warm_up).result()  # loads the model, and compiles the constraints
        server, address = start_server(args, Path(folder) / "log")
        try:
            asyncio.run(ask_all(address, warm_up, 4))
            for some in rounds:
                answered, seconds = alone.submit(one_batch, args, some).result()
                expected |= {row["id"]: as_reply(row) for row in answered}
                batch.append(seconds)
                began = time.perf_counter()
                some_replies, some_statuses = asyncio.run(ask_all(address, some, args.clients))
                served.append(time.perf_counter() - began)
                replies, statuses = replies | some_replies, statuses + some_statuses
                memory.append(measure.memory_of([server.pid])["anonymous"])
            alone.shutdown()
            other = [row_id for row_id, reply in replies.items() if reply != expected[row_id]]
            lost, end = len(rows) - len(replies), time.monotonic() + 60 * args.minutes
            while time.monotonic() < end:
                again, more = asyncio.run(ask_all(address, rows, args.clients, SHARE_GONE))
                lost += len(rows) - more["gone"] - len(again)
                statuses += more
                other += [row_id for row_id, reply in again.items() if reply != expected[row_id]]
                memory.append(measure.memory_of([server.pid])["anonymous"])
        finally:
            server.terminate()
            ended = server.wait(90)
    figures = {
        "requests": sum(statuses.values()), "statuses": dict(statuses), "lost": lost, "not equal": len(other),
        "per second": len(rows) / sum(served), "batch per second": len(rows) / sum(batch),
        "ratio": statistics.median(one / many for one, many in zip(batch, served, strict=True)),
        "memory in GB": [round(value, 3) for value in memory], "exit status": ended,
    }
    lines = [[name, json.dumps(value) if isinstance(value, dict | list) else f"{value:,.3f}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    measure.report(f"{args.clients} clients, {len(rows)} questions of {args.topn} documents, {Path(args.llm_model).name}", ["figure", "value"], lines, figures, args.output_file)


if __name__ == "__main__":
    main()
