"""Every model of recipes/models, as a tiny model of its real architecture, through the real trainer and the real engine.

FULL=1, because four families take minutes: elsewhere test_chain.py and test_gpus.py train and ask a Llama, and
test_templates.py compares the tokens of all of them. One process of LLaMA-Factory trains all families in turn, by the functions
that its command line calls.
"""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from chat_tokenizers import FAMILIES, KINDS, TRAIN_PYTHON, facts_of, make_tiny
from conftest import write_jsonl
from stages import REPO

import inference
import sampling_dpo_trajectories
from dynamicrag.llm import requests
from dynamicrag.llm.prompts import Prompts, training_row

pytestmark = [pytest.mark.slow, pytest.mark.full]

ON_CPU = {
    "deepspeed": None, "use_cpu": True, "preprocessing_num_workers": None, "disable_gradient_checkpointing": True, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4, "num_train_epochs": 30, "warmup_steps": 2, "logging_steps": 1, "plot_loss": False, "save_strategy": "no",
}
# In .venv-train. Argument: a file of jobs, each [what, settings].
WITH_LLAMAFACTORY = """
import json, sys
from llamafactory.train.tuner import export_model, run_exp
for what, settings in json.load(open(sys.argv[1])):
    {"train": run_exp, "export": export_model}[what](settings)
"""
ROWS = [
    {"id": f"nq_{n}", "question": f"which river is number {n}?", "answers": ["the Nile"],
     "docs": [{"id": f"d{n}_{m}", "title": f"River {m}", "text": f"Number {m * n} costs {m} %."} for m in range(1, 5)]}
    for n in range(1, 7)
]
CHOSEN, ANSWER = "[2]", "the Nile"


def write_sets(folder: Path) -> None:
    prompts, sets = Prompts(), {"reranker_bc_training": [], "generator_sft_training": [], "reranker_dpo": [], "generator_dpo": [], "reranker_kto": [], "generator_kto": [],
                             "reranker_best_of_n": [], "generator_best_of_n": []}
    for row in ROWS:
        choosing, answering = prompts.reranker(row["question"], row["docs"]), prompts.generator(row["question"], row["docs"][1:2], prompts.instruction(row))
        sets["reranker_bc_training"].append(training_row(choosing, output=CHOSEN))
        sets["generator_sft_training"].append(training_row(answering, output=ANSWER))
        sets["reranker_dpo"].append(training_row(choosing, chosen=CHOSEN, rejected="[1], [3]"))
        sets["generator_dpo"].append(training_row(answering, chosen=ANSWER, rejected="None of the documents"))
        for role, prompt, right, wrong in (("reranker", choosing, CHOSEN, "[1], [3]"), ("generator", answering, ANSWER, "None of the documents")):
            sets[f"{role}_best_of_n"].append(training_row(prompt, output=right))
            sets[f"{role}_kto"] += [{**training_row(prompt, output=output), "kto_tag": output == right} for output in (right, wrong)]
    for name, rows in sets.items():
        for prefix in [f"{model}_" for model in FAMILIES] if name.endswith(("dpo", "kto", "best_of_n")) else [""]:
            (folder / f"{prefix}{name}.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with base/MODEL, full/MODEL, DynamicRAG_MODEL/sft (of a merged adapter), .../dpo and .../dpo_lora, kto, kto_lora and best_of_n of every family."""
    folder = tmp_path_factory.mktemp("families")
    for name in ("recipes", "training_data"):
        (folder / name).mkdir()
    (folder / "recipes/dataset_info.json").write_text((REPO / "recipes/dataset_info.json").read_text())
    write_sets(folder / "training_data")
    jobs = []
    for model in FAMILIES:
        base, sft = folder / "base" / model, folder / f"DynamicRAG_{model}/sft"
        make_tiny(model, base)

        def train(recipe: str, start: Path, output: Path, model: str = model, **settings) -> None:
            given = yaml.safe_load((REPO / f"recipes/{model}/{recipe}.yaml").read_text())
            adapter = given["finetuning_type"] == "lora"
            words = {**ON_CPU, **settings, "model_name_or_path": str(start), "dataset_dir": str(folder / "recipes"), "output_dir": str(output / "adapter" if adapter else output)}
            jobs.append(["train", {key: value for key, value in {**given, **words}.items() if value is not None}])
            if adapter:  # as merge() of scripts/training.sh
                jobs.append(["export", {
                    "model_name_or_path": str(start), "adapter_name_or_path": str(output / "adapter"), "template": given["template"],
                    "finetuning_type": "lora", "export_dir": str(output), "export_device": "cpu",
                }])

        train("sft", base, folder / "full" / model, learning_rate=0.003)
        train("sft_lora", base, sft, learning_rate=0.01)
        train("dpo", sft, sft.with_name("dpo"), num_train_epochs=2, learning_rate=0.0001)
        train("dpo_lora", sft, sft.with_name("dpo_lora"), num_train_epochs=2, learning_rate=0.001)
        train("kto_lora", sft, sft.with_name("kto_lora"), num_train_epochs=2, learning_rate=0.001)
        train("kto", sft, sft.with_name("kto"), num_train_epochs=2, learning_rate=0.0001)
        train("best_of_n", sft, sft.with_name("best_of_n"), num_train_epochs=2, learning_rate=0.0001)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([TRAIN_PYTHON, "-c", WITH_LLAMAFACTORY, folder / "jobs.json"], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("model", FAMILIES)
def test_full_training_lora_and_dpo_change_the_weights_and_lower_the_loss(trained, model):
    import torch
    from safetensors.torch import load_file

    run = trained / f"DynamicRAG_{model}"
    folders = {"base": trained / "base" / model, "full": trained / "full" / model, **{name: run / name for name in ("sft", "dpo", "dpo_lora", "kto", "kto_lora", "best_of_n")}}
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    assert len({frozenset(of) for of in weights.values()}) == 1, "a merged model is an ordinary checkpoint"
    changed = "model.layers.0.mlp.up_proj.weight"
    for before, after in (("base", "full"), ("base", "sft"), *(("sft", trained_from_it) for trained_from_it in ("dpo", "dpo_lora", "kto", "kto_lora", "best_of_n"))):
        assert not torch.equal(weights[before][changed].bfloat16(), weights[after][changed].bfloat16()), after
    kind, _ = KINDS[model]
    assert {json.loads((folder / "config.json").read_text())["model_type"] for folder in folders.values()} == {kind}
    for stage in (folders["full"], run / "sft/adapter", run / "dpo", run / "dpo_lora/adapter"):
        first, *middle, last = losses(stage)
        print(f"{stage.relative_to(trained)}: loss {first:.3f} to {last:.3f} in {len(middle) + 2} steps")
        assert last < first


@pytest.mark.parametrize("model", FAMILIES)
def test_the_trained_model_samples_and_answers_and_ends_its_replies(trained, model, monkeypatch, tmp_path, caplog):
    """It was taught one selection and one answer: it writes them to the end token and no further, asked in its own chat format."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.chdir(tmp_path)
    engines, load = [], requests.load_engine

    def once(args):
        engines[:] = engines or [load(args)]
        return engines[0]

    monkeypatch.setattr(requests, "load_engine", once)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**row, "true_id": [2], "false_id": [1, 3, 4]} for row in ROWS])
    flags = ["--llm-model", str(trained / f"DynamicRAG_{model}"), "--max-model-len", "2048", "--topn", "4"]
    sampling_dpo_trajectories.main(["--input-json", str(rows), "--output-json", "sampled.json", "--num-samples", "4", *flags])
    inference.main(["--input-json", str(rows), "--output-json", "answers.json", "--remain-output-json", "remain.json", "--constrain-ids", "off", *flags])
    sampled, answers = json.loads(Path("sampled.json").read_text()), json.loads(Path("answers.json").read_text())
    print(f"{model}: selections {Counter(text for row in sampled for text in row['selections'] + row['invalid_selections'])}, "
          f"answers {Counter(row['response'] for row in answers)}")
    assert len(sampled) == len(answers) == len(ROWS) and json.loads(Path("remain.json").read_text()) == []
    ended = len(engines[0]._prompts.tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    lists = [ids for row in sampled for ids in row["id_lists"]]
    assert len(lists) == 4 * len(ROWS) and lists.count([2]) > 0.9 * len(lists)
    for row in sampled:
        assert row["invalid_selections"] == [] and row["responses"] == [ANSWER] * 4 and row["response_tokens"] == [ended] * 4
    assert {(tuple(row["id_list"]), row["response"]) for row in answers} == {((2,), ANSWER)}
    assert "--selection-max-tokens" not in caplog.text and "--answer-max-tokens" not in caplog.text, "no reply was cut off"
    assert facts_of(model)["template"] in engines[0]._prompts.name or str(trained) in engines[0]._prompts.name
