"""The part about the LLM engine: it starts, answers a batch, and frees all GPU memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_check import data
from gpu_check.part import ROOT, Run, Skipped, needs

CHOICE = "(None|[0-9])"


def vllm(run: Run) -> None:
    needs("vllm")
    if run.dry:
        raise Skipped("the tests start the engine on a CPU")
    if run.device == "cpu":
        raise Skipped("no GPU")
    run.case("one batch, twice", _engine, run)


def _engine(run: Run) -> dict:
    from gpu_check.training import small_llama

    model = small_llama(run.folder / "model")
    before = _used()
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "gpu_check.engine", str(model)], cwd=ROOT, env=os.environ, capture_output=True, text=True,
                          timeout=max(run.left() - 2, 1))
    print(done.stdout[-3000:], done.stderr[-6000:])
    assert done.returncode == 0, f"the engine ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    seconds = time.monotonic() - began
    for _ in range(20):
        if _used() <= before + 300:
            break
        time.sleep(0.5)
    assert _used() <= before + 300, f"{_used() - before} MiB of GPU memory are still taken after the engine's end"
    return {"seconds": round(seconds, 1), **json.loads(done.stdout.splitlines()[-1])}


def _used() -> int:
    """Return the used GPU memory in MiB."""
    return int(subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30).stdout.split()[0])


def main(model: Path) -> None:
    """Start the engine in this process and request the same batch twice."""
    import re

    from dynamicrag.llm.engine import Request, VllmEngine
    from dynamicrag.llm.options import EngineOptions

    engine = VllmEngine(EngineOptions(str(model), "template/smollm2.jinja", max_model_len=2048, gpu_memory_utilization=0.3))
    asked = [Request([{"role": "user", "content": text}], seed=number, max_tokens=16, n=8, temperature=1.0) for number, text in enumerate(data.texts(16, 20))]
    chosen = [Request([{"role": "user", "content": text}], seed=number, max_tokens=8, pattern=CHOICE) for number, text in enumerate(data.texts(16, 20))]
    first, second = engine.complete(asked + chosen), engine.complete(asked + chosen)
    assert all(len(completion.texts) == 8 for completion in first[:16]), "expected 8 samples per request"
    assert any(len(set(completion.texts)) > 1 for completion in first[:16]), "all samples of every request are the same"
    outside = [text for completion in first[16:] for text in completion.texts if not re.fullmatch(CHOICE, text)]
    assert not outside, f"outside the pattern: {outside[:3]}"
    print(json.dumps({"same samples with the same seeds": [completion.texts for completion in first] == [completion.texts for completion in second]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
