"""Make the small model's warm-up set: documents once, then several questions about them, each with the documents it needs.

A large model can find the document that speaks of what is asked before it is trained to. A model of 135 M parameters has to
learn it, and a single question is one identifier to learn from for four hundred tokens read: from such it learns how many
documents to name, not which (docs/evidence.md). So a conversation shows the documents of one question in the reranker's prompt,
and goes on with further questions made of the facts that stand in the same documents: ten selections for one reading, which
differ by nothing but what is asked. --role generator makes the same of answers. A conversation that is longer than the trainer's cutoff_len
loses its last questions, and one whose first question does not fit is left out; both are counted.

Reads    --input_file     questions with gold_docs and their retrieved docs, of the countries that may be trained on
         --passages       the passages that corpus.py wrote
Writes   --output_file    LLaMA-Factory rows with a history: instruction, input, output, system, history

    python examples/factbook/warm_up.py --input_file output/factbook/reranker_retrieval.jsonl --max_rows 320
"""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator

from facts import Fact, read_facts
from questions import MAKERS, Pool, find_paragraphs, find_unique

from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, as_text, training_row
from dynamicrag.llm.training_rows import add_length_flags, check_columns, load_window
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.tasks import target_answer
from dynamicrag.stage import ArgumentParser, UserError, derive_seed, log, run

# How often each kind is tried for a further question. Those of several documents succeed rarely among so few; those that
# need none always do.
WEIGHTS = {"one": 20, "two": 26, "bridge": 30, "many": 26, "none": 4, "verify": 10, "long": 6, "ambiguous": 6}
TRIES = 80
FURTHER = "Which documents are needed to answer the question: {question}"


def parse_args(argv: list[str] | None = None):
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", required=True, help="retrieval output for questions of training countries")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="the passages that corpus.py wrote")
    group.add_argument("--output_file", default="training_data/factbook_warm_up.json", help="the warm-up set")
    add_prompts_flag(group)
    add_length_flags(parser, "recipes/smollm2_135m/warm_up.yaml")
    group = parser.add_argument_group("conversations")
    group.add_argument("--role", choices=["reranker", "generator"], default="reranker", help="what is trained: to choose documents, or to answer from them")
    group.add_argument("--max_rows", type=int, help="conversations, each from another question of the input (default: all)")
    group.add_argument("--n_docs", type=int, default=5, help="documents shown; those needed are always among them")
    group.add_argument("--questions", type=int, default=10, help="questions a conversation, at most")
    group.add_argument("--shuffled", type=float, default=0.5, help="share of conversations whose documents are in no order; the others keep the retriever's")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return parser.parse_args(argv)


def show(row: dict, passages: dict[str, dict], n_docs: int, rng: random.Random | None = None) -> list[dict]:
    """The documents a question needs and the best ranked others, `n_docs` in all or as many as are needed; in the retriever's
    order, what was not retrieved last, or with `rng` in any."""
    needed = [passages[doc_id] for doc_id in row["gold_docs"]]
    others = [doc for doc in row["docs"] if doc["id"] not in row["gold_docs"]]
    shown = needed + others[:max(n_docs - len(needed), 0)]
    if rng is not None:
        return rng.sample(shown, len(shown))
    rank = {doc["id"]: at for at, doc in enumerate(row["docs"])}
    return sorted(shown, key=lambda doc: rank.get(doc["id"], len(rank)))


class Facts:
    """The facts and paragraphs of the countries that may be asked about, by passage."""

    def __init__(self, rows: list[dict], passages: dict[str, dict]):
        facts, everything = read_facts([*passages.values()]), find_paragraphs([*passages.values()])
        self.unique = find_unique(facts)
        asked = {passages[doc_id]["title"].rpartition(": ")[0] for row in rows for doc_id in row["gold_docs"]}
        self.all = {country: facts[country] for country in sorted(asked & facts.keys())}
        self.holders: dict[str, list[str]] = defaultdict(list)
        self.of_passage: dict[str, list[tuple[str, str, Fact]]] = defaultdict(list)
        for country, known in self.all.items():
            for key, fact in known.items():
                self.holders[key].append(country)
                self.of_passage[fact.passage].append((country, key, fact))
        self.paragraphs = {country: everything[country] for country in self.all if country in everything}

    def pool(self, shown: set[str], rng: random.Random) -> Pool:
        """What can be asked of the documents shown."""
        facts: dict[str, dict[str, Fact]] = defaultdict(dict)
        for doc_id in sorted(shown):
            for country, key, fact in self.of_passage[doc_id]:
                facts[country][key] = fact
        paragraphs = {
            country: whole for country in facts
            if (whole := {name: parts for name, parts in self.paragraphs.get(country, {}).items() if {doc for doc, _, _ in parts} <= shown})
        }
        unique = {(country, key) for country, key in self.unique if key in facts.get(country, {})}
        return Pool(facts, paragraphs, set(), unique, rng)


def further_questions(first: dict, pool: Pool, claims: Pool, shown: set[str], count: int) -> list[dict]:
    """Up to `count` questions other than the first, all of whose needed documents are shown. `claims` makes those to verify."""
    asked, found = {first["question"].lower()}, []
    kinds = [kind for kind in WEIGHTS if pool.countries or kind == "none"]
    for _ in range(TRIES):
        if len(found) == count:
            break
        kind = pool.rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        row = MAKERS[kind](claims if kind == "verify" else pool)
        if row is None or row["mark"] in asked or row["question"].lower() in asked or not shown.issuperset(row["gold_docs"]):
            continue
        asked.update((row["mark"], row["question"].lower()))
        found.append(row)
    return found


def turn(role: str, row: dict, docs: list[dict], further: bool, prompts: Prompts) -> dict[str, str]:
    """A question's training row in one of the two roles, as if it were asked alone; a further one does not show the documents again."""
    if role == "generator":
        messages = prompts.generator(row["question"], [] if further else docs, prompts.instruction(row))
        return training_row(messages, output=target_answer(row))
    messages = prompts.reranker(row["question"], docs)
    if further:
        messages[-1]["content"] = as_text(FURTHER.format(question=row["question"]))
    position = {doc["id"]: at for at, doc in enumerate(docs, start=1)}
    return training_row(messages, output=format_ids(sorted(position[doc_id] for doc_id in row["gold_docs"]), prompts.notation))


def conversation(docs: list[dict], questions: list[dict], prompts: Prompts, role: str = "reranker") -> dict:
    """A LLaMA-Factory row: the documents and the first question, then question after question."""
    *before, last = [turn(role, row, docs, number > 0, prompts) for number, row in enumerate(questions)]
    return {**last, "history": [[row["instruction"], row["output"]] for row in before]}


def conversations(rows: list[dict], passages: dict[str, dict], args, prompts: Prompts) -> Iterator[dict]:
    facts = Facts(rows, passages)
    for row in rows:
        rng = random.Random(derive_seed(args.seed, row["id"], "warm-up"))
        docs = show(row, passages, args.n_docs, rng if rng.random() < args.shuffled else None)
        shown = {doc["id"] for doc in docs}
        pool = facts.pool(shown, rng)
        claims = copy.copy(pool)  # a false claim takes another country's value, of any country
        claims.facts, claims.holders = facts.all, facts.holders
        yield conversation(docs, [row, *further_questions(row, pool, claims, shown, args.questions - 1)], prompts, args.role)


def read_questions(path: str, passages_path: str) -> tuple[list[dict], dict[str, dict]]:
    """The questions of a retrieval output, and the passages by id. Raises UserError naming file, line and key."""
    passages = {passage["id"]: passage for _, passage in read_json(passages_path)}
    rows = []
    for line, row in read_json(path):
        for key in ("id", "question", "docs", "gold_docs"):
            if key not in row:
                raise UserError(f"{path}:{line}: key '{key}' is missing; this takes retriever.py's output for questions.py's questions")
        if unknown := next((doc_id for doc_id in row["gold_docs"] if doc_id not in passages), None):
            raise UserError(f"{path}:{line}: key 'gold_docs': {unknown!r} is no passage of {passages_path}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no row")
    return rows, passages


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows, passages = read_questions(args.input_file, args.passages)
    rows = random.Random(args.seed).sample(rows, min(args.max_rows or len(rows), len(rows)))
    window = load_window(args)
    whole = conversations(rows, passages, args, Prompts(args.prompts))
    made = [fitted.row for fitted in window.kept(whole, lambda row: [window.conversation(row)], len(rows), "conversations", args.input_file)]
    write_json(args.output_file, made)
    check_columns(args, args.output_file)
    window.counts("questions")
    turns = sum(len(row["history"]) + 1 for row in made)
    log.info("%s: %d conversations, %d questions", args.output_file, len(made), turns)


if __name__ == "__main__":
    run(main)
