"""Freeze behaviour: run every stage on made-up data and tiny models, and compare what each one writes with a record.

    python tests/freeze.py --compare tests/frozen.json        exit 0: all files are equal; 1: the files that differ are named
    python tests/freeze.py --record tests/frozen.json         after a change that is meant to change what a stage writes

Stages are only started by their scripts at the root, as a user starts them, so that modules may move. If a command fails, the exit
status is 2. The record covers the files that the stages write (except manifests), the requests to the LLM and the judge
(requests/COMMAND.jsonl, sorted), and the printed tables (printed/COMMAND.txt).

The record of a file is the sha256 of all its bytes, with these exceptions:
- Rows are without `error`, which holds the words of a message.
- Numbers that a model or a logarithm computes (MODEL_NUMBERS) may differ in their last digits from one machine to the next.
  They are left out of the hash, rounded to 4 decimals and compared with a tolerance of 0.0005. Ids and their order are in the
  hash; --record refuses scores so close together that another machine might order them in another way.
No other file holds such numbers: the encoder is exact (tests/freeze_inputs.py), and the training data comes from the scores
of a run file and from rewards without BERTScore.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from freeze_inputs import write_inputs
from freeze_server import SELECTION_TOKENS, Server

REPO = Path(__file__).resolve().parents[1]
EMBED = "generate_passage_embeddings.py --model_name_or_path models/encoder --dtype float32 --device cpu"
ENCODE = "--model_name_or_path models/encoder --passage_store cache/tsv --dtype float32 --device cpu --n_docs 8"
DENSE = f"retriever.py {ENCODE} --passages data/passages.tsv --passages_embeddings 'data/embeddings/*' --query data/test.json"
WORDS = "retriever.py --passages data/passages.jsonl --passage_store cache/jsonl --query data/test.json --n_docs 8 --index bm25"
RERANK = "reranker.py --input_file output/bm25.jsonl --n_docs 4 --dtype float32 --device cpu"
LLM = f"--llm-model models/llm --api-base {{url}} --selection-max-tokens {SELECTION_TOKENS}"
SAMPLE = f"sampling_dpo_trajectories.py {LLM} --input-jsonl training_data/dpo.jsonl"
JUDGE = "--judge-base-url {url} --judge-model judge --judge-cache cache/judge.sqlite"
REWARD = "reward_trajectories.py --input_file output/sampled.json"
PAIRS = "construct_dpo.py --train_recipe recipes/dpo.yaml --input_file training_data/rewarded.jsonl"
ANSWER = f"inference.py {LLM} --input-json output/test.jsonl"
WINDOWS = f"top_inference.py {LLM} --input-jsonl output/test.jsonl --max-context-window 3"

# Name -> command. A command reads the files of earlier commands.
COMMANDS = {
    "embed 0": f"{EMBED} --passages data/passages.tsv --passage_store cache/tsv --output_dir data/embeddings --num_shards 2 --shard_id 0",
    "embed 1": f"{EMBED} --passages data/passages.tsv --passage_store cache/tsv --output_dir data/embeddings --num_shards 2 --shard_id 1",
    "embed after a prompt": f"{EMBED} --passages data/passages.jsonl --passage_store cache/jsonl --output_dir data/prompted --passage_prompt 'a passage: ' --max_length 12",
    "split": "split_data.py --input_file data/questions.json --output_dir data/splits --num_splits 2 --on_error skip",
    "split evenly": "split_data.py --input_file data/test.json --output_dir data/quarters --num_splits 4",
    "retrieve 0": f"{DENSE} --query data/splits/split_0.json --output_dir output/retrieval_split_0.json",
    "retrieve 1": f"{DENSE} --query data/splits/split_1.json --output_dir output/retrieval_split_1.json",
    "aggregate": "aggregate.py",
    "retrieve part 0": f"{DENSE} --corpus_shard 0/2 --output_dir output/corpus_part_0.json",
    "retrieve part 1": f"{DENSE} --corpus_shard 1/2 --output_dir output/corpus_part_1.json",
    "aggregate parts": "aggregate.py --input_files 'output/corpus_part_*.json' --output_file output/by_part.jsonl",
    "retrieve faiss": f"{DENSE} --index IVF1,SQ8 --index_path cache/faiss --output_file output/faiss.jsonl",
    "retrieve fused": f"{DENSE} --index flat bm25 --output_file output/fused.jsonl",
    "retrieve after a prompt": f"retriever.py {ENCODE} --passages data/passages.tsv --passages_embeddings 'data/prompted/*' --query data/test.json "
                               "--query_prompt 'a question: ' --max_length 9 --output_file output/prompted.jsonl",
    "retrieve bm25": f"{WORDS} --output_file output/bm25.jsonl",
    "retrieve run": "retriever.py --passages data/passages.tsv --passage_store cache/tsv --query data/test.json --n_docs 5 --run data/reranker.run --output_file output/run.jsonl",
    "share": "prepare_data.py --export_run output/run.jsonl --run_name run_of_others --encoder none --output_dir cache/shared",
    "take what is shared": "prepare_data.py --shared_runs cache/shared --name run_of_others --output_dir output/prepared",
    "rerank": "reranker.py --input_file output/retrieval_data.jsonl --run data/reranker.run --output_file output/retrieval_data_rerank.jsonl",
    "rerank sorted": "reranker.py --input_file output/fused.jsonl --run data/reranker.run --sort --logits --output_file output/sorted.jsonl",
    "rerank monot5": f"{RERANK} --model_name_or_path models/monot5 --output_file output/monot5.jsonl",
    "rerank classifier": f"{RERANK} --model_name_or_path models/classifier --output_file output/classifier.jsonl",
    "rerank causal": f"{RERANK} --model_name_or_path models/causal --max_length 90 --output_file output/causal.jsonl",
    "evaluate retrieval": "evaluate_retrieval.py --results_file output/retrieval_data_rerank.jsonl --k 1 3 8 --run_file output/reranked.run --table_file output/retrieval.md",
    "evaluate retrieval qrels": "evaluate_retrieval.py --results_file output/run.jsonl data/reranker.run --eval_file data/test.json --qrels data/qrels.txt --group_by kind --k 2 5 --output_file output/qrels.json",
    "label": "process_training_data.py --max_rows 5 --n_docs 7",
    "label gold": "process_training_data.py --max_rows 5 --labels gold --input_file output/test.jsonl --sequence_file training_data/gold_sequence.jsonl --normal_file training_data/gold_normal.jsonl",
    "label padded": "process_training_data.py --max_rows 9 --targets padded --max_length 4 --n_docs 7 --sequence_file training_data/padded_sequence.jsonl --normal_file training_data/padded_normal.jsonl",
    "reranker set": "reranker_sequence.py --train_recipe recipes/sft.yaml",
    "reranker set padded": "reranker_sequence.py --train_recipe recipes/sft.yaml --cutoff_len 2000 --prompts data/reranker_prompts.yaml --input_file training_data/padded_sequence.jsonl --output_file training_data/padded_bc.json",
    "reranker set estimated": "reranker_sequence.py --train_recipe recipes/sft.yaml --tokenizer unknown/model --cutoff_len 260 --input_file training_data/padded_sequence.jsonl --output_file training_data/estimated_bc.json",
    "divide": "split_for_sft_dpo.py --sft_size 5 --dev_size 2 --dpo_file training_data/dpo.jsonl",
    "generator set": "construct_generator_sft.py --train_recipe recipes/sft.yaml --tokenizer unknown/model --cutoff_len 110",
    "sample": f"{SAMPLE} --num-samples 6 --include-expert --topn 7 --output-json output/sampled.json",
    "sample permuted": f"{SAMPLE} --num-samples 3 --permute --temperature 0.7 --top-p 0.9 --topn 7 --seed 7 --reranker-model models/other --output-json output/permuted.json",
    "sample unconstrained": f"{SAMPLE} --num-samples 5 --constrain-ids off --topn 7 --answer-max-tokens 20 --output-json output/unconstrained.json",
    "reward": f"{REWARD} {JUDGE} --weights em=.3,rouge=.2,length=.2,judge=.3 --output_file training_data/rewarded.jsonl",
    "reward bert": f"{REWARD} --bert_model models/classifier --device cpu --answer-match contains --output_file output/rewarded_bert.jsonl",
    "reward other weights": "reward_trajectories.py --input_file training_data/rewarded.jsonl --reweight --weights em=1,length=.5 --output_file output/reweighted.jsonl",
    "reward responses": f"{REWARD} --weights em=.5,length=.5 --length-of response --output_file output/rewarded_length.jsonl",
    "pairs": f"{PAIRS} --reranker_file training_data/reranker_dpo.json --generator_file training_data/generator_dpo.json",
    "pairs all": f"{PAIRS} --cutoff_len 2000 --pairs all --pair-by set --min-margin 0.05 --max-pairs-per-question 3 --max-reranker-pairs 9 --generator-chosen best --reranker_file training_data/all_reranker.json --generator_file training_data/all_generator.json",
    "pairs top bottom": f"{PAIRS} --cutoff_len 2000 --pairs top-bottom:2 --keep-mean .01,.9 --reranker_file training_data/top_reranker.json --generator_file training_data/top_generator.json",
    "pairs published": f"{PAIRS} --cutoff_len 2000 --recipe published --reranker_file training_data/published_reranker.json --generator_file training_data/published_generator.json",
    "best of n": "construct_best_of_n.py --train_recipe recipes/sft.yaml --cutoff_len 2000 --input_file training_data/rewarded.jsonl --reranker_file training_data/best_reranker.json --generator_file training_data/best_generator.json",
    "kto": "construct_kto.py --train_recipe recipes/sft.yaml --cutoff_len 2000 --input_file training_data/rewarded.jsonl --reranker_file training_data/kto_reranker.json --generator_file training_data/kto_generator.json",
    "answer": f"{ANSWER} --selector dynamic none all top:2 monot5 adaptive pointwise gold --output-json results/{{{{input}}}}_{{{{selector}}}}.json",
    "answer unconstrained": f"{ANSWER} --constrain-ids off --selection-temperature 0.5 --topn 5 --llm-model models/sft --output-json results/test_unconstrained.json",
    "answer in other words": f"{ANSWER} --prompts data/prompts.yaml --reranker-model models/other --answer-max-tokens 30 --output-json results/test_words.jsonl",
    "windows": f"{WINDOWS} --topn 5 8 --output-json results/test_windows_{{{{topn}}}}.json",
    "windows in order": f"{WINDOWS} --topn 8 --order retrieval --constrain-ids off --output-json output/test_in_order.json",
    "divide test": "split_data.py --input_file output/test.jsonl --output_dir data/test_parts --num_splits 2",
    "answer part 0": f"{ANSWER} --input-json data/test_parts/split_0.json --output-json output/answers/part_0.json",
    "answer part 1": f"{ANSWER} --input-json data/test_parts/split_1.json --output-json output/answers/part_1.json",
    "aggregate answers": "aggregate.py --input_files 'output/answers/part_[01].json' --questions output/test.jsonl --splits_dir data/test_parts --output_file output/answers.json",
    "evaluate": "evaluate.py --results_file results/test_dynamic.json results/test_none.json results/test_top2.json results/test_gold.json --eval_file data/test.json --compare --table_file output/compared.md --output_file output/compared.json",
    "evaluate match": "evaluate.py --results_file results/test_unconstrained.json --metric match --entity_support --group_by kind --output_file output/match.json",
    "evaluate f1": "evaluate.py --results_file results/test_words.jsonl --metric f1 --output_file output/f1.json",
    "evaluate rouge": "evaluate.py --results_file results/test_windows_8.json --metric rouge_lsum --output_file output/rouge.json",
}
FROZEN = ("data/embeddings", "data/prompted", "data/splits", "data/quarters", "data/test_parts", "output", "training_data", "results", "report", "requests", "printed")
MODEL_NUMBERS = {  # file: the keys of these numbers
    "output/bm25.jsonl": ("score",),
    "output/monot5.jsonl": ("score", "rerank_score"),
    "output/classifier.jsonl": ("score", "rerank_score"),
    "output/causal.jsonl": ("score", "rerank_score"),
    "output/rewarded_bert.jsonl": ("bert", "response_scores"),
}
DECIMALS, TOLERANCE = 4, 5e-4
LEAST_GAP = 2e-5  # between the scores that order documents, and between a score and the 0.5 of a label
REPORT_SECONDS = 3.0  # the run time of every results file: the report has no other figure of a clock


class Broken(Exception):
    """A command failed, or its files cannot be recorded."""


# ---------------------------------------------------------------- running


def run_chain(folder: Path) -> None:
    """Run all commands in `folder`, which has the inputs."""
    server = Server()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        for name, command in COMMANDS.items():
            log.write(f"==== {name}\n")
            run_script(name, command.format(url=server.url), log)
            if asked := server.take():
                write(f"requests/{name}.jsonl", "\n".join(asked))
            if name == "rerank":  # later commands read these rows both as training data and as an evaluation file
                rows = Path("output/retrieval_data_rerank.jsonl").read_bytes()
                Path("output/test.jsonl").write_bytes(rows)
        run_report(log)
    server.shutdown()


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def run_script(name: str, command: str, log: io.TextIOBase) -> None:
    """Do what `python COMMAND` does, in this process. Raises Broken if the exit status is not 0."""
    script, *arguments = shlex.split(command)
    printed = io.StringIO()
    before, sys.argv = sys.argv, [str(REPO / script), *arguments]
    try:
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(printed):
            runpy.run_path(str(REPO / script), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise Broken(f"{name}: exit status {ended.code}: python {command}\n{tail(log)}") from None
    except Exception as error:
        raise Broken(f"{name}: python {command}\n{traceback.format_exc()}") from error
    finally:
        sys.argv = before
    if printed.getvalue():
        write(f"printed/{name}.txt", printed.getvalue())


def run_report(log: io.TextIOBase) -> None:
    for path in Path("results").glob("*.manifest.json"):
        manifest = json.loads(path.read_bytes())
        path.write_text(json.dumps({**manifest, "seconds": REPORT_SECONDS}), encoding="utf-8")
    command = ["bash", str(REPO / "scripts/report.sh"), str(Path("results").resolve()), "--output_dir", str(Path("report").resolve()), "--cases", "6"]
    # Another checkout of the package may be installed in the environment.
    done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(REPO)})
    if done.returncode:
        raise Broken(f"report: exit status {done.returncode}: {shlex.join(command)}\n{tail(log)}")


def tail(log: io.TextIOBase) -> str:
    log.flush()
    return Path(log.name).read_text(encoding="utf-8")[-3000:]


# ---------------------------------------------------------------- hashing


def frozen_files() -> dict[str, str | dict]:
    """The sha256 of each file by path. Files of MODEL_NUMBERS also have their numbers."""
    paths = sorted(path for root in FROZEN for path in Path(root).rglob("*") if path.is_file() and not path.name.endswith(".manifest.json"))
    return {str(path): freeze(path) for path in paths}


def freeze(path: Path) -> str | dict:
    content, keys = path.read_bytes(), MODEL_NUMBERS.get(str(path), ())
    if not keys and b'"error"' not in content:
        return hashlib.sha256(content).hexdigest()
    numbers: list[float] = []
    if path.suffix == ".json":
        text = json.dumps(_without(json.loads(content), keys, numbers), ensure_ascii=False)
    else:
        text = "\n".join(json.dumps(_without(json.loads(line), keys, numbers), ensure_ascii=False) for line in content.splitlines())
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"sha256": digest, "numbers": [round(number, DECIMALS) for number in numbers]} if keys else digest


def _without(value: object, keys: tuple[str, ...], numbers: list[float], key: str = "") -> object:
    """The value without the words of errors and without the numbers under `keys`. Those are appended to `numbers`."""
    if isinstance(value, dict):
        return {name: "" if name == "error" else _without(part, keys, numbers, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_without(part, keys, numbers, key) for part in value]
    if key in keys:
        numbers.append(value)
        return 0
    return value


def check_separated() -> None:
    """Raise Broken if model scores are so close that another machine might order or label documents differently.

    Only BM25 orders documents by such scores. It gives equal texts equal scores.
    """
    for path, keys in MODEL_NUMBERS.items():
        for line in Path(path).read_bytes().splitlines() if "score" in keys else ():
            row = json.loads(line)
            key = "rerank_score" if "rerank_score" in keys else "score"
            scores = [doc[key] for doc in row["docs"]]
            others = [0.5] if key == "rerank_score" else scores
            if close := [(one, two) for one in scores for two in others if 0 < abs(one - two) < LEAST_GAP]:
                raise Broken(f"{path}: row {row['id']}: {key} {close[0][0]} and {close[0][1]} are too close; take another seed in freeze_inputs.py")


def differing(recorded: dict[str, str | dict], found: dict[str, str | dict]) -> list[str]:
    """A line per file that differs, which says how."""
    lines = []
    for path in sorted(recorded.keys() | found.keys()):
        before, now = recorded.get(path), found.get(path)
        if before is None or now is None:
            lines.append(f"{path}: {'new' if before is None else 'missing'}")
        elif isinstance(before, str) or isinstance(now, str):
            lines += [f"{path}: differs"] * (before != now)
        elif before["sha256"] != now["sha256"] or len(before["numbers"]) != len(now["numbers"]):
            lines.append(f"{path}: differs")
        else:
            largest = max(abs(one - two) for one, two in zip(before["numbers"], now["numbers"], strict=True))
            lines += [f"{path}: a model's number differs by {largest:.4f}"] * (largest > TOLERANCE)
    return lines


# ---------------------------------------------------------------- the program


def prepare() -> None:
    """Prepare the environment of the commands. Questions are encoded in a thread, since a new process takes seconds to start."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.endswith("API_KEY")]:
        del os.environ[name]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    concurrent.futures.ProcessPoolExecutor = lambda *_, **__: concurrent.futures.ThreadPoolExecutor(1)
    sys.path.insert(0, str(REPO))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", metavar="FILE", type=Path, help="write the record")
    what.add_argument("--compare", metavar="FILE", type=Path, help="compare with a record")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave all files in this new folder, to be compared by diff -r")
    args = parser.parse_args(argv)
    file = (args.record or args.compare).resolve()
    recorded = json.loads(file.read_bytes()) if args.compare else {}
    prepare()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep.resolve() if args.keep else Path(temporary)) / "run"
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            write_inputs(folder)
            run_chain(folder)
            if args.record:
                check_separated()
        except Broken as broken:
            print(broken, file=sys.stderr)
            return 2
        finally:
            os.chdir(REPO)
        os.chdir(folder)
        found = frozen_files()
        os.chdir(REPO)
    if args.record:
        file.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{file}: {len(found)} files")
        return 0
    lines = differing(recorded, found)
    print("\n".join(lines) or f"{len(found)} files are as recorded")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
