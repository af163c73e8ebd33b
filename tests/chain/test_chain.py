"""The whole chain, end to end, by the commands of docs/pipeline.md: real faiss, real vLLM, real LLaMA-Factory, tiny models."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import make_text, make_tiny_llama, read_jsonl, write_jsonl
from stages import STAGES, page_commands

REPO = Path(__file__).parents[2]
# What a machine with two cores and no hub adds to a command of the page.
TRAIN_ON_CPU = (
    "deepspeed=null use_cpu=true flash_attn=sdpa disable_gradient_checkpointing=true preprocessing_num_workers=1 "
    "max_steps=2 gradient_accumulation_steps=1 cutoff_len=2048 plot_loss=false"
)
ADDED = {
    **{f"python {stage.name}.py": stage.tiny for stage in STAGES.values()},
    "llamafactory-cli train recipes/llama3_8b/sft.yaml": f"model_name_or_path=models/tiny-llama {TRAIN_ON_CPU}",
    **{f"llamafactory-cli train recipes/llama3_8b/{recipe}.yaml": TRAIN_ON_CPU for recipe in ("dpo", "best_of_n")},
    "llamafactory-cli train recipes/llama3_8b/kto.yaml": f"dataset=llama3_8b_reranker_kto {TRAIN_ON_CPU}",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, encoder_dir, monot5_dir, corpus_tsv, warm) -> Path:
    """A folder in which every stage command of docs/pipeline.md has been run as printed, plus ADDED."""
    import random

    folder = tmp_path_factory.mktemp("chain")
    for script in REPO.glob("*.py"):
        (folder / script.name).symlink_to(script)
    for name in ("template", "recipes"):
        shutil.copytree(REPO / name, folder / name)
    (folder / "models/reranker").mkdir(parents=True)
    (folder / "models/retriever").symlink_to(encoder_dir)
    (folder / "models/reranker/monot5").symlink_to(monot5_dir)
    make_tiny_llama(folder / "models/tiny-llama")
    (folder / "data").mkdir()
    (folder / "data/psgs_w100.tsv").symlink_to(corpus_tsv)
    rng = random.Random(5)
    questions = [
        {"id": f"nq_{n}", "question": f"which {make_text(rng, 3, 8)} ?", "answer": make_text(rng, 1, 2), "note": n}
        for n in range(40)
    ]
    (folder / "data/rag_training_data.json").write_text(json.dumps(questions), encoding="utf-8")
    train_bin = REPO / ".venv-train/bin"
    environment = {
        **os.environ, "PATH": f"{warm.folder}:{REPO}/.venv/bin:{train_bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "DISABLE_VERSION_CHECK": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    for command in page_commands():
        if command.startswith("python retriever.py"):  # once for every part, as the page says
            for part in range(1, 8):
                _run(command.replace("split_0", f"split_{part}"), folder, environment)
        if command.startswith("python inference.py"):  # evaluation files are retrieved and reranked like any other
            shutil.copytree(folder / "output", folder / "eval_data")
            rows = read_jsonl(folder / "output/retrieval_data_rerank.jsonl")[:12]
            write_jsonl(folder / "eval_data/nq.jsonl", rows)
            write_jsonl(folder / "eval_data/nq_top500.jsonl", rows)
        extra = next((flags for key, flags in ADDED.items() if key in command.split(" --")[0]), "")
        _run(f"{command} {extra}", folder, environment)
    return folder


def _run(command: str, folder: Path, environment: dict) -> None:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.slow
def test_every_stage_wrote_its_rows(chain):
    labelled = read_jsonl(chain / "training_data/retrieval_data_rerank_normal.jsonl")
    expert = read_jsonl(chain / "training_data/retrieval_data_rerank_sequence.jsonl")
    assert len(labelled) + len(expert) == 40
    assert all(row["dataset"] == "nq" and row["answers"] == [row["answer"]] and "note" in row for row in labelled + expert)
    assert all(len(row["docs"]) == 50 and len(row["true_id"]) + len(row["false_id"]) == 40 for row in labelled + expert)
    sampled = json.loads((chain / "results/training_data_dpo_sampling.json").read_text())
    assert all(len(row["id_lists"]) == len(row["responses"]) == 4 and row["usage"]["calls"] >= 2 for row in sampled)
    rewarded = read_jsonl(chain / "training_data/llama3_8b_output_dpo.jsonl")
    assert all(0 <= score <= 1 for row in rewarded for score in row["response_scores"])
    assert {"em", "bert", "rouge", "length"} == set(rewarded[0]["score_terms"][0])


@pytest.mark.slow
def test_every_trainer_wrote_a_model_that_differs_from_the_one_it_began_with(chain):
    from safetensors.torch import load_file

    stages = ["models/tiny-llama", *(f"DynamicRAG_llama3_8b/{stage}" for stage in ("sft", "dpo", "best_of_n", "kto"))]
    base, sft, *trained = [load_file(chain / stage / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float() for stage in stages]
    assert not base.equal(sft)
    for number, weights in enumerate(trained):
        assert not any(weights.equal(other) for other in (sft, *trained[:number])), stages[number + 2]


@pytest.mark.slow
def test_trainer_read_the_prompt_and_the_system_prompt(chain):
    """The columns of dataset_info.json exist in what the stages write, for SFT and for DPO alike."""
    info = json.loads((chain / "recipes/dataset_info.json").read_text())
    for name in ("reranker_bc", "generator_sft", "llama3_8b_reranker_kto", *(f"llama3_8b_{role}_{kind}" for role in ("reranker", "generator") for kind in ("dpo", "best_of_n"))):
        rows = json.loads((chain / "recipes" / info[name]["file_name"]).read_text())
        assert rows
        for row in rows:
            assert set(info[name]["columns"].values()) == set(row)
            assert row["system"] and row["instruction"] and row["input"] == ""
            assert row.get("chosen", "x") != row.get("rejected", "y")


@pytest.mark.slow
@pytest.mark.parametrize("results", ["results/llama3_8b_nq", "results/llama3_8b_top_500_nq"])
def test_inference_answered_every_question_from_documents_shown(chain, results):
    rows = json.loads((chain / f"{results}.json").read_text())
    assert len(rows) == 12 and json.loads((chain / f"{results}_remain.json").read_text()) == []
    for row in rows:
        assert isinstance(row["response"], str)
        assert row["final_docs"] == [row["docs"][position - 1]["id"] for position in row["id_list"]]
    manifest = json.loads((chain / f"{results}.json.manifest.json").read_text())
    assert manifest["counts"]["answered"] == 12 and manifest["seed"] == 42


@pytest.mark.slow
def test_evaluation_scored_every_question(chain):
    metrics = json.loads((chain / "results/llama3_8b_nq.json.metrics.json").read_text())
    summary = metrics["results"]["llama3_8b_nq"]
    assert summary["n"] == 12 and summary["metric"] == "match" and summary["calls"] == 2


@pytest.mark.slow
def test_the_scripts_answer_every_set_with_one_model_and_compare_windows(chain, warm):
    """Two evaluation sets, one of them with documents beyond the window."""
    rows = read_jsonl(chain / "eval_data/nq.jsonl")
    write_jsonl(chain / "eval_data/popqa.jsonl", [{**row, "id": f"popqa_{n}", "dataset": "popqa"} for n, row in enumerate(rows[:5])])
    environment = {
        **os.environ, **warm.environment, "WORK": str(chain), "EVAL_QUESTIONS": "nq.jsonl popqa.jsonl", "SELECTORS": "none dynamic", "N_DOCS_SHOWN": "5",
        "TOP_N": "7 12", "ENGINE_FLAGS": "--max-model-len 4096 --answer-max-tokens 8", "VLLM_CPU_KVCACHE_SPACE": "1", "NUM_SHARDS": "1",
    }
    _run("bash scripts/infer_all.sh configs/llama3_8b.env && bash scripts/11_top_n.sh configs/llama3_8b.env", REPO, environment)
    for name, asked in {"nq": 12, "popqa": 5}.items():
        for result in ("none", "dynamic", "windows7", "windows12", "monot5_of_7"):
            assert len(json.loads((chain / f"results/{name}_dpo_{result}.json").read_text())) == asked
        assert len((chain / f"results/{name}_top_n.md").read_text().split("\n\n")[0].splitlines()) == 2 + 1 + 2 + 2
    windows = json.loads((chain / "results/nq_top_n.metrics.json").read_text())["results"]
    assert 2 <= windows["nq_dpo_dynamic"]["calls"] < windows["nq_dpo_windows7"]["calls"] < windows["nq_dpo_windows12"]["calls"]


@pytest.mark.slow
def test_rounds_of_dpo_go_on_from_each_other_and_are_compared(chain, warm):
    """Two rounds from the SFT model: an untrained model is right about nothing, so the SFT model stays the best."""
    environment = {
        **os.environ, **warm.environment, "WORK": str(chain), "DEV_QUESTIONS": str(chain / "eval_data/nq.jsonl"),
        "PATIENCE": "2", "BERT_MODEL": str(chain / "models/retriever"),
        "DPO_FLAGS": TRAIN_ON_CPU, "DPO_RECIPE": "simpo", "SAMPLE_FLAGS": "--num-samples 4 --answer-max-tokens 8 --include-expert",
        "ENGINE_FLAGS": "--max-model-len 4096", "PAIR_FLAGS": "--pairs top-bottom:2", "VLLM_CPU_KVCACHE_SPACE": "1", "NUM_SHARDS": "1",
    }
    command = "bash scripts/iterate.sh 2 configs/llama3_8b.env"
    _run(command, REPO, environment)
    rounds = chain / "rounds"
    assert (rounds / "best").read_text() == "0" and (chain / "DynamicRAG_llama3_8b/best").resolve() == (chain / "DynamicRAG_llama3_8b/sft").resolve()
    manifests = [json.loads((rounds / f"{n}/results/training_data_dpo_sampling.json.manifest.json").read_text()) for n in (1, 2)]
    assert manifests[1]["arguments"]["llm_model"] == str(rounds.resolve() / "1/DynamicRAG_llama3_8b/dpo")
    assert [manifest["seed"] for manifest in manifests] == [43, 44]
    assert len((rounds / "rounds.md").read_text().splitlines()) == 5
    settings = (rounds / "2/DynamicRAG_llama3_8b/dpo/trained_on.sha256").read_text()
    assert "simpo.yaml" in settings and "1/DynamicRAG_llama3_8b/dpo/trainer_state.json" in settings
    before = {path: path.stat().st_mtime_ns for path in rounds.rglob("*.safetensors")}
    _run(command, REPO, environment)
    assert {path: path.stat().st_mtime_ns for path in rounds.rglob("*.safetensors")} == before and len(before) == 2, "nothing is done twice"


READ_RECIPES = """
import sys, yaml
from llamafactory.hparams.parser import _parse_train_args
for recipe in sys.argv[1:]:
    print(recipe, file=sys.stderr)
    _parse_train_args({**yaml.safe_load(open(recipe)), "use_cpu": True, "deepspeed": None})
"""


@pytest.mark.slow
def test_every_recipe_is_one_the_trainer_reads(warm):
    recipes = sorted([*(path for path in (REPO / "recipes").glob("*/*.yaml") if path.parent.name != "models"), *(REPO / "examples/train_full").glob("*.yaml")])
    assert len(recipes) == 7 + 4 + 6 * 12 + 2
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    command = [warm.trainer_python, "-c", READ_RECIPES, *recipes]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
