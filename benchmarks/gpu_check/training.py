"""Parts about training: LLaMA-Factory through train() of scripts/training.sh, on a small Llama with random weights."""

import json
import math
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from gpu_check import data
from gpu_check.__main__ import end
from gpu_check.part import ROOT, Run, Skipped

CHATML = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|unused|>", "<|im_end|>")
TRAIN = 'config=$1; shift; source scripts/common.sh "$config"; train "$@"'
COMMON = {"learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1, "plot_loss": "false", "template": "smollm2",
          "preprocessing_num_workers": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps"}


class Training:
    """A place for runs of train(): a work folder, a model to start from, and an executable of the trainer."""

    def __init__(self, run: Run):
        self.run, self.work, self.bin = run, run.folder / "work", run.folder / "bin"
        python, path = _python_of_the_trainer(run)
        self.bin.mkdir()
        (self.work / "training_data").mkdir(parents=True)
        self._script("llamafactory-cli", f'export PYTHONPATH="{path}"\nexec "{python}" "{ROOT}/benchmarks/gpu_check/trainer.py" "$@"')
        self._script("torchrun", f'export PYTHONPATH="{path}"\nexec "{python}" -m torch.distributed.run "$@"')
        self._script("python", f'exec "{sys.executable}" "$@"')
        self.deepspeed = subprocess.run([python, "-c", "import deepspeed"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=90).returncode == 0
        self.peak_file = run.folder / "peak"

    def _script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def start(self, model: str, stage: str, recipe: str, files: list[Path], settings: dict) -> tuple[subprocess.Popen, Path]:
        config = self.work / f"{model}.env"
        config.write_text(f'WORK=${{WORK:-{self.work}}}\nMODEL={model}\n')
        command = ["bash", "-c", TRAIN, "train", str(config), stage, recipe, *map(str, files), "--", *(f"{key}={value}" for key, value in settings.items())]
        environment = {**os.environ, "LLAMAFACTORY": str(self.bin / "llamafactory-cli"), "PATH": f"{self.bin}:{os.environ['PATH']}",
                       "GPU_CHECK_PEAK": str(self.peak_file), **({"CUDA_VISIBLE_DEVICES": ""} if self.run.dry else {})}
        environment.pop("PYTHONPATH", None)
        log = self.run.folder / f"train_{len(list(self.run.folder.glob('train_*')))}.log"
        with log.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file), log

    def limit(self, seconds: float = 75) -> float:
        """Return the maximum seconds of a run of train(). On a CPU, this is all of the remaining time."""
        return max(self.run.left() - 2 if self.run.dry else min(seconds, self.run.left() - 2), 1)

    def finish(self, process: subprocess.Popen, log: Path, seconds: float = 75) -> str:
        """Wait for a run and return its output. Raises AssertionError if it failed or reached the limit."""
        try:
            status = process.wait(self.limit(seconds))
        except subprocess.TimeoutExpired:
            end(process)
            status = "its limit"
        said = log.read_text(errors="replace")
        if status != 0:
            print(said[-6000:])
        assert status == 0, f"train() ended with {status}: {_reason(said)}"
        return said


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("error:")]
    return " | ".join((errors or lines)[-2:])[-400:]


def _python_of_the_trainer(run: Run) -> tuple[str, str]:
    """Return the Python that has LLaMA-Factory, and its PYTHONPATH."""
    wheels = run.wheels.get("training", "")
    if wheels and (Path(wheels) / "llamafactory").is_dir():
        return sys.executable, os.pathsep.join(filter(None, [wheels, run.wheels.get("pipeline")]))
    own = ROOT / ".venv-train/bin/python"
    if own.exists():
        return str(own), ""
    if find_spec("llamafactory"):
        return sys.executable, ""
    raise Skipped("llamafactory not installed")


def small_llama(folder: Path, vocabulary: int | None = None, layers: int = 4, width: int = 256) -> Path:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([f"[{number}] {text}" for number, text in enumerate(data.texts(300, 30))], vocab_size=700, special_tokens=list(CHATML), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, bos_token=CHATML[0], eos_token=CHATML[4], pad_token=CHATML[1])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16_384, bos_token_id=0, eos_token_id=4, pad_token_id=1,
    )
    return data.saved(folder, LlamaForCausalLM(config), tokenizer)


def _rows(path: Path, pair: bool, count: int = 64, length: int = 12) -> Path:
    """Write questions with learnable answers: words of the question; the rejected side repeats the same words."""
    rng, rows = random.Random(0), []
    for text in data.texts(count, length, seed=9):
        answer = " ".join(rng.choices(text.split(), k=8))
        rows.append({"system": "", "instruction": text, "input": "", **({"chosen": answer, "rejected": "none of them " * 3} if pair else {"output": answer})})
    path.write_text(json.dumps(rows))
    return path


def training(run: Run) -> None:
    """Run SFT, DPO, and SFT under ZeRO-3 to the end; SFT and ZeRO-3 are also killed and resumed."""
    device = run.device
    # A small model, rows and settings
    place = Training(run)
    model = small_llama(run.folder / "model", layers=2 if run.dry else 4, width=64 if run.dry else 256)
    folder = place.work / "training_data"
    bc, answers = _rows(folder / "reranker_bc_training.json", False), _rows(folder / "generator_sft_training.json", False)
    pairs = [_rows(folder / f"smollm2_135m_{name}_dpo.json", True) for name in ("reranker", "generator")]
    light = {"bf16": "false"} if run.dry else {}  # most CPUs only emulate bfloat16
    steps = 6 if run.dry else 16
    settings = {**COMMON, "model_name_or_path": model, "cutoff_len": 512, "dataset": "reranker_bc,generator_sft", **light}

    # The runs
    def sft() -> dict:
        return _killed_and_resumed(place, "smollm2_135m", [bc, answers], settings, steps)

    def dpo() -> dict:
        began = time.monotonic()
        more = {**COMMON, "model_name_or_path": model, "cutoff_len": 512, "max_steps": steps, "save_steps": steps, **light}
        place.finish(*place.start("smollm2_135m", "dpo", "dpo", pairs, more))
        return {**_trained(place.work / "DynamicRAG_smollm2_135m/dpo", model, steps), "seconds": round(time.monotonic() - began, 1)}

    def zero3() -> dict:
        if device == "cpu":
            raise Skipped("ZeRO-3 of bfloat16 needs a GPU")
        if not place.deepspeed:
            raise Skipped("deepspeed not installed")
        return _killed_and_resumed(place, "llama3_8b", [bc, answers], settings, steps)

    def refused() -> dict:
        if device == "cpu" or not place.deepspeed:
            raise Skipped("needs a GPU and deepspeed")
        given = {**settings, "output_dir": run.folder / "refused", "max_steps": 1, "dataset_dir": place.work / "recipes"}
        command = [str(place.bin / "llamafactory-cli"), "train", "recipes/llama3_8b/sft.yaml", *(f"{key}={value}" for key, value in given.items())]
        environment = {key: value for key, value in os.environ.items() if key != "FORCE_TORCHRUN"} | {"DISABLE_VERSION_CHECK": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(min(60, run.left() - 2), 1))
        assert done.returncode and "FORCE_TORCHRUN=1" in done.stderr, f"status {done.returncode}: {_reason(done.stderr)}"
        return {"refused": True}

    # The cases
    run.case("ZeRO-3 SFT, killed and resumed", zero3)  # first, because only a GPU can run it
    run.case("ZeRO-3 without FORCE_TORCHRUN is refused", refused)
    run.case("DPO", dpo)
    run.case("SFT, killed and resumed", sft)


def _killed_and_resumed(place: Training, model: str, files: list[Path], settings: dict, steps: int) -> dict:
    """Run SFT, kill it after its first checkpoint, and start it again with the same settings."""
    folder = place.work / f"DynamicRAG_{model}/sft"
    settings = {**settings, "max_steps": steps, "save_steps": 2}
    began, limit = time.monotonic(), place.limit()
    process, log = place.start(model, "sft", "sft", files, settings)
    while process.poll() is None and time.monotonic() - began < limit and not list(folder.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    killed = process.poll() is None
    end(process)
    first = time.monotonic() - began
    said = log.read_text(errors="replace")
    if not killed or not list(folder.glob("checkpoint-*/trainer_state.json")):
        print(said[-6000:])
        raise AssertionError(f"no checkpoint before its end or {first:.0f} s: {_reason(said)}")
    assert not (folder / "trained_on.sha256").exists(), "it was over before it was killed"
    began = time.monotonic()
    said = place.finish(*place.start(model, "sft", "sft", files, settings))
    assert "resum" in said.lower(), "the second run did not resume"
    return {**_trained(folder, Path(settings["model_name_or_path"]), steps), "first_s": round(first, 1), "second_s": round(time.monotonic() - began, 1)}


def _trained(folder: Path, start: Path, steps: int) -> dict:
    """Check the losses of a finished training, and its weights as loaded by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    assert (folder / "trained_on.sha256").exists(), "trained_on.sha256 is missing"
    assert not list(folder.glob("checkpoint-*")), "a checkpoint is left"
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    print("losses", losses)
    assert state["global_step"] == steps == len(losses), f"{state['global_step']} steps and {len(losses)} losses; expected {steps}"
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    assert sum(losses[-3:]) < sum(losses[:3]), f"the loss does not fall: {losses}"
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    after, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"], f"the weights are not complete: {loading}"
    old, new = before.state_dict(), after.state_dict()
    assert all(bool(value.isfinite().all()) for value in new.values()), "a weight is not finite"
    assert all(old[key].shape == new[key].shape for key in old) and any(not torch.equal(old[key], new[key]) for key in old), "the weights are those of the start"
    return {"loss": f"{losses[0]:.3f} to {losses[-1]:.3f}", "steps": steps, "weights": sum(value.numel() for value in new.values())}


def dpo_memory(run: Run) -> None:
    """Measure the peak GPU memory of DPO on 2 x 8192 tokens with Llama 3's vocabulary and one layer, mainly the logits."""
    if run.dry or run.device == "cpu":
        raise Skipped("a CPU has no GPU memory to measure")
    place = Training(run)
    model = small_llama(run.folder / "model", vocabulary=128_256, layers=1, width=256)
    folder = place.work / "training_data"
    pairs = [_rows(folder / f"smollm2_135m_{name}_dpo.json", True, count=4, length=12_000) for name in ("reranker", "generator")]
    settings = {**COMMON, "model_name_or_path": model, "cutoff_len": 8192, "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 1}

    def measured() -> dict:
        place.finish(*place.start("smollm2_135m", "dpo", "dpo", pairs, settings), seconds=100)
        peak = float(place.peak_file.read_text())
        assert 25 < peak < 60, f"{peak} GiB; 38 to 40 are computed"
        return {"peak_gib": peak}

    run.case("2 x 8192 tokens, 128,256 in the vocabulary", measured)
