"""The one registry of the stages at the repository's root: what the tests know of each.

A new stage gets an entry here. The tests of flags, of malformed, hostile and interrupted input, and of the chain then run it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ROWS, MODEL, ENGINE, SCORES, HUB = "rows", "model", "engine", "scores", "hub"
MODEL_FLAGS = ("--model_name_or_path", "--bert_model", "--llm-model", "--reranker-model")


@dataclass(frozen=True)
class Stage:
    """A stage and its command lines.

    {rows} is the file under test, {good} the folder of the other inputs (running.py: make_good), {out} the folder of the outputs.
    If a command line has a flag twice, the last one counts.
    """

    name: str
    kind: str  # ROWS: reads and writes rows. MODEL: loads an encoder or a reranker. ENGINE: asks an LLM. SCORES: only scores rows. HUB: prepares data
    flags: str  # flags of every command line; the first one names {rows}
    light: str = ""  # further flags of the smallest command line, which loads no model if there is a choice
    full: str = ""  # the same of a command line that loads the model and has several chunks of 40 rows
    reads: str = ""  # the {rows} of the full command line: the file of an earlier stage, the questions or the corpus
    inputs: dict[str, str] = field(default_factory=dict)  # flags that name inputs; the values are flags with which the file is opened
    full_inputs: dict[str, str] = field(default_factory=dict)  # the same flags of the full command line
    tiny: str = ""  # further flags of the command in docs/pipeline.md for tiny models

    @property
    def input(self) -> str:
        """The flag that names {rows}."""
        return self.flags.split()[0]

    @property
    def outputs(self) -> list[str]:
        """The flags that name outputs."""
        return re.findall(r"(--(?!splits_dir|passage_store)\S+) \{out\}", self.flags)

    @property
    def model(self) -> str | None:
        """The flag that names the model."""
        return next((flag for flag in (*self.inputs, *self.full_inputs) if flag in MODEL_FLAGS), None)


PROMPTS = {"--prompts": ""}
LENGTHS = {"--train_recipe": "", "--tokenizer": "--template {good}/chat.jinja", "--template": "--tokenizer {good}/monot5"}
LLM = "--template {good}/chat.jinja --llm-model {good}/model"
LLM_INPUTS = {"--input-json": "", **PROMPTS, "--template": "", "--reranker-template": "--reranker-model {good}/model", "--llm-model": "", "--reranker-model": ""}
LLM_CHUNKS = "--chunk-size 7 --topn 5"

# In an order in which each stage finds the files that it reads.
STAGES = {stage.name: stage for stage in (
    Stage("prepare_data", HUB, "--export_run {rows} --output_dir {out}/shared --run_name shared --corpus none --encoder none",
          inputs={"--export_run": "", "--shared_runs": "--name shared"}),  # the hub itself: test_prepare_data.py
    Stage("generate_passage_embeddings", MODEL,
          "--passages {rows} --passage_store {out}/store --output_dir {out}/embeddings --device cpu --model_name_or_path {good}/encoder",
          full="--dtype float32", reads="corpus.tsv", inputs={"--passages": "", "--passage_store": "", "--model_name_or_path": ""}),
    Stage("split_data", ROWS, "--input_file {rows} --output_dir {out}/splits --num_splits 2",
          full="--num_splits 3", reads="train.jsonl", inputs={"--input_file": ""}),
    Stage("retriever", MODEL, "--query {rows} --passages {good}/corpus.tsv --output_file {out}/retrieved.jsonl",
          light="--passage_store {good}/store --index bm25",
          full="--passage_store {out}/store --model_name_or_path {good}/encoder --passages_embeddings {good}/embeddings/*.npy --dtype float32 --device cpu "
               "--n_docs 6 --questions_per_pass 7 --output_file {out}/retrieved_0.jsonl",
          reads="train.jsonl", inputs={"--query": "", "--passages": "", "--passage_store": "", "--run": "--index"},
          full_inputs={"--passages_embeddings": "", "--model_name_or_path": "", "--index_path": "--index IVF1,SQ8"}),
    Stage("aggregate", ROWS, "--input_files {rows} --output_file {out}/all.jsonl --splits_dir {out}/none",
          reads="retrieved_*.jsonl", inputs={"--input_files": "", "--splits_dir": "", "--questions": ""}),
    Stage("reranker", MODEL, "--input_file {rows} --output_file {out}/reranked.jsonl",
          light="--run {good}/reranker.run", full="--model_name_or_path {good}/monot5 --dtype float32 --device cpu",
          reads="retrieved_0.jsonl", inputs={"--input_file": "", "--run": ""}, full_inputs={"--model_name_or_path": ""}),
    Stage("process_training_data", ROWS, "--input_file {rows} --sequence_file {out}/sequence.jsonl --normal_file {out}/normal.jsonl",
          full="--n_docs 5", reads="reranked.jsonl", inputs={"--input_file": ""}),
    Stage("reranker_sequence", ROWS, "--input_file {rows} --output_file {out}/bc.json",
          reads="sequence.jsonl", inputs={"--input_file": "", **PROMPTS, **LENGTHS}),
    Stage("split_for_sft_dpo", ROWS, "--input_file {rows} --sft_file {out}/sft.jsonl --dpo_file {out}/dpo.jsonl",
          full="--dev_file {out}/dev.jsonl --dev_size 4", reads="normal.jsonl", inputs={"--input_file": ""}),
    Stage("construct_generator_sft", ROWS, "--input_file {rows} --output_file {out}/generator.json",
          reads="sft.jsonl", inputs={"--input_file": "", **PROMPTS, **LENGTHS}),
    Stage("sampling_dpo_trajectories", ENGINE, f"--input-json {{rows}} --output-json {{out}}/sampled.json {LLM}",
          light="--num-samples 2", full=LLM_CHUNKS, reads="normal.jsonl", inputs=LLM_INPUTS, tiny="--num-samples 4"),
    Stage("reward_trajectories", MODEL, "--input_file {rows} --output_file {out}/rewarded.jsonl",
          light="--weights em=.5,rouge=.5", full="--bert_model {good}/encoder --device cpu --chunk_size 7",
          reads="sampled.json", full_inputs={
              "--bert_model": "--weights bert=1", "--llm-model": "--weights likelihood=1 --template {good}/chat.jinja",
              "--template": "--weights likelihood=1 --llm-model {good}/model"},
          tiny="--bert_model models/retriever",
          inputs={"--input_file": "", **PROMPTS, "--judge-cache": "--judge-model m --weights judge=1,em=1 --judge-base-url http://127.0.0.1:9/v1"}),
    Stage("construct_dpo", ROWS, "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json",
          reads="rewarded.jsonl", inputs={"--input_file": "", **PROMPTS, **LENGTHS}),
    Stage("construct_best_of_n", ROWS, "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json",
          reads="rewarded.jsonl", inputs={"--input_file": "", **PROMPTS, **LENGTHS}),
    # An untrained model is never right, so that no answer is desirable.
    Stage("construct_kto", ROWS, "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json",
          reads="rewarded.jsonl", inputs={"--input_file": "", **PROMPTS, **LENGTHS}, full="--roles reranker", tiny="--roles reranker"),
    # An untrained model answers with noise up to the limit: 8 tokens of it are enough.
    Stage("inference", ENGINE, f"--input-json {{rows}} --output-json {{out}}/answered.json {LLM}",
          light="--constrain-ids off", full=LLM_CHUNKS, reads="reranked.jsonl", inputs=LLM_INPUTS, tiny="--answer-max-tokens 8"),
    Stage("top_inference", ENGINE, f"--input-json {{rows}} --output-json {{out}}/windows.jsonl {LLM}",
          light="--max-context-window 3", full=f"{LLM_CHUNKS} --max-context-window 2", reads="reranked.jsonl", inputs=LLM_INPUTS, tiny="--answer-max-tokens 8"),
    Stage("evaluate", SCORES, "--results_file {rows} --output_file {out}/metrics.json", inputs={"--results_file": "", "--remain_file": "", "--eval_file": ""}),
    Stage("evaluate_retrieval", SCORES, "--results_file {rows} --output_file {out}/retrieval.json",
          inputs={"--results_file": "", "--eval_file": "", "--qrels": ""}),
)}
# Stages that read one file of rows. The others read indexes, corpora, sets of shards and a hub: test_retrieval.py, test_io.py, test_prepare_data.py.
ALONE = [name for name in STAGES if name not in ("aggregate", "retriever", "generate_passage_embeddings", "prepare_data")]


def of_kind(*kinds: str) -> tuple[str, ...]:
    """The names of the stages of these kinds."""
    return tuple(stage.name for stage in STAGES.values() if stage.kind in kinds)


ROW_STAGES = tuple(name for name, stage in STAGES.items() if stage.kind != HUB and stage.input != "--passages")
LLM_STAGES = of_kind(ENGINE)
SCORERS = of_kind(SCORES)  # they always rewrite their output and use every row, so they have neither --on_error nor --overwrite
TOOLS = ("publish", "serve")  # scripts at the root that are no stages: they write no rows, and the chain does not run them
TRAINERS = ("grpo_selector",)  # read rows and write a model; test_grpo.py runs them
CONTINUING = of_kind(ROWS, MODEL, ENGINE)  # a second start of them goes on from what the first one left


def flags_of(name: str, good: Path, out: Path, rows: Path, more: str = "", full: bool = False) -> list[str]:
    """The smallest command line of a stage, or the full one, and `more`."""
    stage = STAGES[name]
    return [part.format(good=good, out=out, rows=rows) for part in f"{stage.flags} {stage.full if full else stage.light} {more}".split()]


def page_commands() -> list[str]:
    """The commands of "The stages" in docs/pipeline.md, in order, each on one line."""
    section = (REPO / "docs/pipeline.md").read_text(encoding="utf-8").split("\n## The stages\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


# ---------------------------------------------------------------- rows

DOCS = [
    {
        "id": f"p{n}", "title": f"Title {n}", "text": f"river number {n}", "score": 9.0 - n,
        "rerank_score": 0.9 if n < 3 else 0.1, "rerank_label": "true" if n < 3 else "false",
    }
    for n in range(1, 5)
]


def row(number: int = 1, **changes) -> dict:
    """A row with every key that any stage needs. A change of None removes the key. Its labels cover as many documents as it has."""
    count = len(changes["docs"]) if isinstance(changes.get("docs"), list) else len(DOCS)
    whole = {
        "id": f"q{number}", "question": f"which river is number {number}?", "answers": ["oil"], "docs": [dict(doc) for doc in DOCS],
        "true_id": [1, 2][:count], "false_id": list(range(3, count + 1)), "true_count": min(count, 2), "sequence": [2, 1], "sequence_length": 2, "docs_shown": 4,
        "id_lists": [[1], [2, 3]], "responses": ["oil", "gas"], "response_tokens": [1, 1], "from_expert": [False, False],
        "response_scores": [0.9, 0.1], "score_terms": [{"em": 1.0, "rouge": 1.0, "length": 0.5}, {"em": 0.0, "rouge": 0.0, "length": 0.3}],
        "id_list": [1], "final_docs": ["p1"], "response": "oil", "usage": {"calls": 2, "prompt_tokens": 10, "generated_tokens": 2},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}
