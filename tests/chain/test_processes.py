"""What runs on several GPUs, in several processes on a CPU: training in two processes, ZeRO-3, tensor parallelism.

Accelerate hands batch n of the shuffled data to process n modulo 2, so step n of two processes trains on the rows that step n
of one process does which accumulates two batches. Halving is exact in binary and the sum of two numbers has no order: losses
and weights are the same to the last bit, whether the recipe shuffles or not. That needs a number of rows that the processes
divide: else Accelerate repeats rows to fill the last step.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import make_text, make_tiny_llama, read_jsonl, write_jsonl
from training import SETTINGS, largest_difference, losses_of, weights_of

from dynamicrag.llm.vllm_environment import bind_cores

REPO = Path(__file__).parents[2]
STEPS, ROWS = 4, 8
# ZeRO-3 sums in another order: seen were 3e-7 of a loss, and 6e-7 in a weight after four steps of up to 1e-3.
LOSS_ROUNDING, WEIGHT_ROUNDING = 1e-6, 3e-6
DATA = {"sft": "reranker_bc", "dpo": "llama3_8b_reranker_dpo"}
# Without a GPU, transformers sets DeepSpeed up only if it is not told of the CPU, and then refuses bf16: hence bf16=false.
ON_CPU = ["use_cpu=true", "deepspeed=null"]
# torchrun gives each process one thread; one process alone must not sum in another order.
ENVIRONMENT = {
    **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false", "PATH": f"{REPO}/.venv-train/bin:{os.environ['PATH']}",
}
# DeepSpeed compiles a kernel for all-reduce within one machine when it starts on a CPU: a minute, and a C++ compiler. Without
# it, it calls torch.distributed for everything, as it does on GPUs.
NO_KERNEL = """import os
if "LOCAL_RANK" in os.environ:
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The recipes, a tiny Llama, and 8 rows of different length for SFT and for DPO."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(REPO / "recipes", folder / "recipes")
    make_tiny_llama(folder / "models/tiny-llama")
    rng = random.Random(3)
    asked = [{"instruction": make_text(rng), "input": "", "system": "You choose."} for _ in range(ROWS)]
    written = ["[1]", "None", "[2], [5]", "[3], [1], [4]"]
    (folder / "training_data").mkdir()
    for name, rows in {
        "reranker_bc_training": [{**row, "output": written[n % 4]} for n, row in enumerate(asked)],
        "llama3_8b_reranker_dpo": [{**row, "chosen": written[n % 4], "rejected": written[(n + 1) % 4]} for n, row in enumerate(asked)],
    }.items():
        (folder / f"training_data/{name}.json").write_text(json.dumps(rows))
    (folder / "no_kernel").mkdir()
    (folder / "no_kernel/sitecustomize.py").write_text(NO_KERNEL)
    return folder


def run_all(commands: list[list[str]], folder: Path, environments: list[dict], log: Path) -> None:
    """Run the commands at the same time; none and none of their children is left at the end."""
    with log.open("w") as file:
        running = [
            subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True)
            for command, environment in zip(commands, environments, strict=True)
        ]
        try:
            statuses = [process.wait(timeout=300) for process in running]
        finally:
            for process in running:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
    said = log.read_text()
    # torchrun's own report is long and last; the reason is above it
    reasons = [line for line in said.splitlines() if any(word in line for word in ("Error", "error:", "terminate called", "what():", "Fatal", "Aborted"))]
    assert statuses == [0] * len(running), "\n".join([*reasons[-20:], said[-3000:]])


def train(folder: Path, stage: str, output: str, *settings: str, processes: int = 1, **variables: str) -> Path:
    """The output folder of a training that is started as scripts/training.sh starts it; every step takes two rows."""
    command = ["llamafactory-cli", "train"]
    if processes > 1:
        command = ["torchrun", "--nnodes", "1", "--nproc-per-node", str(processes), "--standalone", "--local-addr", "127.0.0.1",
                   f"{REPO}/scripts/train_process.py", "--seconds", "600"]
    command += [
        f"recipes/llama3_8b/{stage}.yaml", *SETTINGS, f"dataset={DATA[stage]}", f"output_dir={output}", f"gradient_accumulation_steps={2 // processes}",
        *settings,
    ]
    run_all([command], folder, [{**ENVIRONMENT, **variables}], folder / f"{output}.log")
    return folder / output


@pytest.fixture(scope="module")
def one_process(folder) -> dict[str, Path]:
    """What one process makes of each stage."""
    outputs = {stage: train(folder, stage, f"{stage}_one", *ON_CPU) for stage in DATA}
    start = weights_of(folder / "models/tiny-llama")
    for output in outputs.values():
        losses = losses_of(output)
        assert len(losses) == STEPS and abs(losses[-1] - losses[0]) > 0.05
        assert largest_difference(start, weights_of(output)) > 1e-3
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_train_as_one_does_that_accumulates_twice_as_much(folder, one_process, stage):
    output = train(folder, stage, f"{stage}_two", *ON_CPU, processes=2)
    assert losses_of(output) == losses_of(one_process[stage])
    assert largest_difference(weights_of(output), weights_of(one_process[stage])) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_zero3_trains_as_one_process_without_it_and_saves_the_whole_model(folder, one_process, stage):
    from transformers import AutoModelForCausalLM

    output = train(
        folder, stage, f"{stage}_zero3", processes=2, DS_ACCELERATOR="cpu", PYTHONPATH=str(folder / "no_kernel")
    )
    states = {path.name for path in output.glob(f"checkpoint-{STEPS}/global_step{STEPS}/*_states.pt")}
    assert states >= {f"zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt" for rank in (0, 1) for part in ("model", "optim")}
    assert losses_of(output) == pytest.approx(losses_of(one_process[stage]), rel=LOSS_ROUNDING, abs=0)
    assert largest_difference(weights_of(output), weights_of(one_process[stage])) <= WEIGHT_ROUNDING
    _, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("cores,ranks,bound", [
    ({0, 1}, 1, "0,1"), ({0, 1}, 2, "0|1"), ({9, 4, 6, 5}, 2, "4,5|6,9"), ({0, 1, 2}, 2, "0|1,2"), ({3}, 2, "3|3"),
])
def test_ranks_divide_the_cores_that_this_process_may_use(cores, ranks, bound):
    assert bind_cores(cores, ranks) == bound


@pytest.mark.slow
def test_two_ranks_of_one_model_select_and_answer_as_one_does(folder):
    """The model is a tiny Llama with weights six times as large: other documents mean another selection, and no token is near another."""
    import torch
    from transformers import LlamaForCausalLM

    if (gpus := torch.cuda.device_count()) == 1:
        pytest.skip("two ranks need two GPUs, or a machine without one")
    environment = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if gpus:
        environment.pop("CUDA_VISIBLE_DEVICES")
    model = LlamaForCausalLM.from_pretrained(folder / "models/tiny-llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() == 2 else 1)
    shutil.copytree(folder / "models/tiny-llama", folder / "models/far")
    model.save_pretrained(folder / "models/far")
    rng = random.Random(4)
    rows = [
        {
            "id": f"nq_{n}", "question": f"which {make_text(rng, 3, 8)} ?", "answers": ["x"],
            "docs": [{"id": str(d), "title": f"Title {d}", "text": make_text(rng), "score": -d} for d in range(6)],
        }
        for n in range(8)
    ]
    write_jsonl(folder / "nq.jsonl", rows)
    done = []
    for ranks in (1, 2):
        command = [
            f"{REPO}/.venv/bin/python", f"{REPO}/inference.py", "--llm-model", "models/far", "--template", f"{REPO}/template/llama3.jinja",
            "--input-json", "nq.jsonl", "--output-json", f"tp_{ranks}.jsonl", "--remain-output-json", f"tp_{ranks}_remain.jsonl",
            "--answer-max-tokens", "6", "--max-model-len", "2048", "--dtype", "float32", "--tensor-parallel-size", str(ranks),
        ]
        run_all([command], folder, [environment], folder / f"tp_{ranks}.log")
        done.append([(row["id_list"], row["response"]) for row in read_jsonl(folder / f"tp_{ranks}.jsonl")])
    assert done[0] == done[1]
    assert len({str(answered) for answered in done[0]}) == len(rows)
    assert len({str(selection) for selection, _ in done[0]}) > 3
