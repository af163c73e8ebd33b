"""experiments/openqa.sh from the first piece to the tables: a tiny model through the real trainer and the real engine, and made-up questions.

FULL=1, because it trains twelve models.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from chat_tokenizers import make_tiny
from conftest import make_text, read_jsonl, write_jsonl
from stages import REPO

pytestmark = [pytest.mark.slow, pytest.mark.full]

SETS = {"nq": 0, "hotpotqa": 5, "2wikimqa": 5, "musique": 5, "svamp": 0}  # documents of their own
SIZES = "--dev 8 --dev_from_train 2wikimqa=2,musique=1 --test_cap svamp=2 --generator 12 --cloning 12 --rl 12 --reranker_held_out 20"


def write_data(folder: Path) -> None:
    """Questions and passages in the form of openmix."""
    import random

    rng = random.Random(4)
    folder.mkdir()
    passages = [{"id": f"p{n}", "title": f"Place {n}", "text": make_text(rng, 8, 16)} for n in range(60)]
    write_jsonl(folder / "passages.jsonl", passages)
    for name, count, sets in (("train", 20, SETS), ("dev", 9, ("nq", "hotpotqa", "svamp")), ("test", 4, SETS)):
        rows = []
        for dataset in sets:
            for number in range(count):
                docs = rng.sample(passages, SETS[dataset])
                gold = [doc["id"] for doc in docs[:2]] if docs else [] if dataset == "svamp" else [rng.choice(passages)["id"]]
                rows.append({"id": f"{dataset}_{name}_{number}", "dataset": dataset, "question": make_text(rng, 3, 6), "answers": [make_text(rng, 1, 2)],
                             "gold_docs": gold, **({"docs": docs} if docs else {})})
        write_jsonl(folder / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_dir, warm):
    """The folder of the finished run, and a function that runs the script again."""
    folder = tmp_path_factory.mktemp("openqa")
    write_data(folder / "data")
    make_tiny("qwen25_7b", folder / "model")
    environment = {
        **os.environ, **warm.environment, "DATA": str(folder / "data"), "MODEL": str(folder / "model"), "ENCODER": str(encoder_dir), "RUN": str(folder / "run"),
        "SEEDS": "1 2", "SPLIT_FLAGS": SIZES, "RERANKER_PAIRS": "24", "N_DOCS": "4", "GATE_QUESTIONS": "4", "PAIRS": "4", "MIN_MARGIN": "0.001", "FORCE": "1",
        "GRPO_DEV": "3", "GRPO_FLAGS": "--num-samples 2 --questions_per_step 2 --rows_per_pass 4 --max_steps 1 --lora_rank 8",
        "TRAIN_FLAGS": "max_steps=2 learning_rate=1e-3 gradient_accumulation_steps=1 plot_loss=false", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }

    def again(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "experiments/openqa.sh"], cwd=REPO, env={**environment, **more}, capture_output=True, text=True, timeout=3000)

    stopped = again(UNTIL="gate")
    assert stopped.returncode == 0, stopped.stderr[-6000:]
    assert not (folder / "run/results").exists()
    done = again()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder / "run", again


def test_every_piece_wrote_its_file_and_its_hours(run):
    folder, _ = run
    arms = {"1": ["bc_plus", "dpo", "dpo_likelihood", "best_of_n", "grpo", "kto", "gold"], "2": ["bc_plus", "dpo"]}
    of_seeds = [piece for seed, names in arms.items() for piece in
                (f"bc_{seed}", f"test_bc_{seed}", f"samples_{seed}", *(p for name in names for p in (f"{name}_{seed}", f"test_{name}_{seed}")))]
    pieces = [line.split("\t")[0] for line in (folder / "hours.tsv").read_text().splitlines()]
    assert pieces == ["lists", "generator", "gate", "baselines", "zero_shot", *of_seeds, "tables"]


def test_equal_sets_have_equal_answers_in_all_systems(run):
    folder, _ = run
    answers: dict[tuple, str] = {}
    files = [*folder.glob("results/test_*.json"), *folder.glob("seed_*/results/test_*.json")]
    assert len(files) == 10 + 8 + 3  # none, top 1 to 4, labels, gap, question, untrained and gold; the arms
    for file in files:
        for row in json.loads(file.read_text()):
            key = row["id"], *sorted(row["final_docs"])
            assert answers.setdefault(key, row["response"]) == row["response"]


def test_the_tables_have_every_system_and_both_hypotheses(run):
    folder, _ = run
    figures = json.loads((folder / "openqa.json").read_text())
    assert figures["systems"]["dpo"]["seeds"] == [1, 2] and figures["systems"]["kto"]["seeds"] == [1]
    assert [(row["name"], row["measure"]) for row in figures["hypotheses"]] == [("H1", "f1"), ("H2", "f1"), ("H2", "selection_f1")]
    assert len(figures["questions"]) == 18
    trained = {(row["arm"], row["seed"]): row for row in figures["trainings"]}
    assert len(trained) == 8 + 3 and all(row["rows"] > 0 for (arm, _), row in trained.items() if arm != "grpo")
    assert trained["dpo", "1"]["sequences"] == 2 * trained["dpo", "1"]["rows"] and trained["dpo", "1"]["generator tokens"] > 0


def test_the_arms_of_a_seed_begin_with_one_model_and_differ(run):
    from safetensors.torch import load_file

    folder, _ = run
    models = [folder / f"seed_1/{name.split('/')[0]}/model/{name.split('/')[1]}" for name in
              ("bc/sft", "bc_plus/sft", "dpo/dpo", "best_of_n/best_of_n", "kto/kto", "gold/sft")]
    weights = [load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float() for model in models]
    assert not any(one.equal(other) for number, one in enumerate(weights) for other in weights[:number])
    begun = {(model / "settings.txt").read_text().split("model_name_or_path=")[1].split()[0] for model in models[1:]}
    assert begun == {str(models[0])}
    for name, term in (("f1", "score"), ("likelihood", "likelihood")):
        assert all(term in terms for row in read_jsonl(folder / f"seed_1/{name}.jsonl") for terms in row["score_terms"])


def test_a_finished_run_does_nothing_and_a_lost_answer_is_generated_again(run):
    folder, again = run
    store, results = folder / "answers/1.jsonl", folder / "results"
    answers = store.read_bytes()
    done = again()
    assert done.returncode == 0 and store.read_bytes() == answers
    assert [line.split("\t")[0] for line in (folder / "hours.tsv").read_text().splitlines()][-2:] == ["tables", "tables"]
    before = {path.name: json.loads(path.read_text()) for path in results.iterdir()}
    store.write_bytes(answers[: len(answers) // 2])  # killed in the middle of a line
    for path in results.iterdir():
        path.unlink()
    done = again()
    assert done.returncode == 0, done.stderr[-6000:]
    assert {path.name: json.loads(path.read_text()) for path in results.iterdir()} == before
    assert {(row["id"], *row["docs"]) for row in read_jsonl(store)[1:]} <= {(row["id"], *row["docs"]) for row in map(json.loads, answers.splitlines()[1:])}
