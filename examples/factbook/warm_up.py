"""Create the warm-up set of the small model: documents once, then several questions about them, each with its needed
documents.

A large model can find the document about a question without training. A model of 135 M parameters must learn it, and a
single question gives only one identifier per four hundred tokens of prompt. From such rows the model learns how many
documents to select, but not which (docs/evidence.md). A conversation therefore shows the documents of one question in
the reranker's prompt and continues with further questions about facts in the same documents: ten selections per prompt
that differ only in the question. --role generator creates the same conversations with answers. With --labels reranker,
the documents shown are the best retrieved ones, and a selection has the documents that the cross-encoder of --reranker
scores above 0.5, best first: no gold label is used. If a conversation
exceeds the trainer's cutoff_len, its last questions are removed. If its first question does not fit, it is left out.
Both are counted.

Reads    --input_file     questions with gold_docs and retrieved docs, about countries of the training set
         --passages       passages written by corpus.py
Writes   --output_file    LLaMA-Factory rows with a history: instruction, input, output, system, history

    python examples/factbook/warm_up.py --input_file output/factbook/reranker_retrieval.jsonl --max_rows 320
"""

import argparse
import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from facts import Fact, read_facts
from questions import MAKERS, Pool, find_paragraphs, find_unique

from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, as_text, training_row
from dynamicrag.llm.recipe import LengthOptions, add_length_flags, check_columns
from dynamicrag.llm.training_rows import load_window
from dynamicrag.models.reranker import document_text
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.tasks import target_answer
from dynamicrag.stage import ArgumentParser, UserError, derive_seed, log, options_from, run

# How often each kind is tried for a further question. Kinds with several documents rarely succeed with so few
# documents; the kind without documents always does.
WEIGHTS = {"one": 20, "two": 26, "bridge": 30, "many": 26, "none": 4, "verify": 10, "long": 6, "ambiguous": 6}
TRIES = 80
FURTHER = "Which documents are needed to answer the question: {question}"


@dataclass(frozen=True)
class ConversationOptions:
    """The conversations to create: flags of this script, which describe them."""

    role: str
    n_docs: int
    questions: int
    shuffled: float
    seed: int
    labels: str = "gold"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", required=True, help="retrieval output for questions of training countries")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="passages written by corpus.py")
    group.add_argument("--output_file", default="training_data/factbook_warm_up.json", help="the warm-up set")
    add_prompts_flag(group)
    add_length_flags(parser, "recipes/smollm2_135m/warm_up.yaml")
    group = parser.add_argument_group("conversations")
    group.add_argument("--role", choices=["reranker", "generator"],
                       default="reranker", help="role to train: select documents, or answer from them")
    group.add_argument("--labels", choices=["gold", "reranker"], default="gold",
                       help="source of the selections; answers (--role generator) are always those of the questions")
    group.add_argument("--reranker", metavar="FOLDER", help="cross-encoder of --labels reranker")
    group.add_argument("--max_rows",
                       type=int, help="number of conversations, each from another question of the input (default: all)")
    group.add_argument("--n_docs", type=int, default=5, help="number of documents shown, including all needed ones")
    group.add_argument("--questions", type=int, default=10, help="maximum number of questions per conversation")
    group.add_argument("--shuffled", type=float, default=0.5,
                       help="share of conversations with shuffled documents; the others keep the retriever's order")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    args = parser.parse_args(argv)
    if args.labels == "reranker" and args.role == "reranker" and not args.reranker:
        parser.error("--labels reranker: needs --reranker, the folder of a cross-encoder")
    return args


def show(row: dict, passages: dict[str, dict], n_docs: int, rng: random.Random | None = None) -> list[dict]:
    """Return the needed documents and the best-ranked others: `n_docs` in total, or as many as are needed.

    They are in the retriever's order, with documents that were not retrieved at the end, or shuffled if `rng` is given.
    """
    needed = [passages[doc_id] for doc_id in row["gold_docs"]]
    others = [doc for doc in row["docs"] if doc["id"] not in row["gold_docs"]]
    shown = needed + others[:max(n_docs - len(needed), 0)]
    if rng is not None:
        return rng.sample(shown, len(shown))
    rank = {doc["id"]: at for at, doc in enumerate(row["docs"])}
    return sorted(shown, key=lambda doc: rank.get(doc["id"], len(rank)))


class Facts:
    """Facts and paragraphs, by passage, of the countries that questions may be about."""

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
        """Return the pool of questions that the documents shown can answer."""
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
    """Return up to `count` further questions whose needed documents are all shown.

    Questions to verify come from `claims`.
    """
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
    """Return a question's training row for `role`, as if it were asked alone. A further question omits the documents."""
    if role == "generator":
        messages = prompts.generator(row["question"], [] if further else docs, prompts.instruction(row))
        return training_row(messages, output=target_answer(row))
    messages = prompts.reranker(row["question"], docs)
    if further:
        messages[-1]["content"] = as_text(FURTHER.format(question=row["question"]))
    position = {doc["id"]: at for at, doc in enumerate(docs, start=1)}
    selection = row.get("selection")
    if selection is None:
        selection = sorted(position[doc_id] for doc_id in row["gold_docs"])
    return training_row(messages, output=format_ids(selection, prompts.notation))


def conversation(docs: list[dict], questions: list[dict], prompts: Prompts, role: str = "reranker") -> dict:
    """Return a LLaMA-Factory row: the documents with the first question, then the other questions."""
    *before, last = [turn(role, row, docs, number > 0, prompts) for number, row in enumerate(questions)]
    return {**last, "history": [[row["instruction"], row["output"]] for row in before]}


def labelled(asked: list[tuple[list[dict], list[dict]]], score: Callable[[list[tuple[str, str]]], Iterable[float]]) -> None:
    """Add to each question its `selection`: the positions of the documents shown that score above 0.5, best first.

    `asked` are the documents and questions of each conversation. All pairs are scored in one call.
    """
    pairs = [(question, doc) for docs, questions in asked for question in questions for doc in docs]
    scores = iter(score([(question["question"], document_text(doc)) for question, doc in pairs]))
    for docs, questions in asked:
        for question in questions:
            judged = [(float(next(scores)), position) for position in range(1, len(docs) + 1)]
            question["selection"] = [position for value, position in sorted(judged, key=lambda one: (-one[0], one[1])) if value > 0.5]


def conversations(
    rows: list[dict], passages: dict[str, dict], options: ConversationOptions, prompts: Prompts,
    score: Callable[[list[tuple[str, str]]], Iterable[float]] | None = None,
) -> Iterator[dict]:
    """Yield the conversations. If `score` is given, their selections are those of this reranker."""
    asked = all_questions(rows, passages, options)
    if score is not None:
        asked = list(asked)
        labelled(asked, score)
    for docs, questions in asked:
        yield conversation(docs, questions, prompts, options.role)


def all_questions(rows: list[dict], passages: dict[str, dict], options: ConversationOptions) -> Iterator[tuple[list[dict], list[dict]]]:
    """Yield for each row the documents to show, and its question with further ones about them."""
    facts = Facts(rows, passages)
    for row in rows:
        rng = random.Random(derive_seed(options.seed, row["id"], "warm-up"))
        order = rng if rng.random() < options.shuffled else None
        if options.labels == "reranker" and options.role == "reranker":
            docs = row["docs"][:options.n_docs]
            docs = docs if order is None else order.sample(docs, len(docs))
        else:
            docs = show(row, passages, options.n_docs, order)
        shown = {doc["id"] for doc in docs}
        pool = facts.pool(shown, rng)
        claims = copy.copy(pool)  # a false claim uses a value of any other country
        claims.facts, claims.holders = facts.all, facts.holders
        yield docs, [dict(row), *further_questions(row, pool, claims, shown, options.questions - 1)]


def read_questions(path: str, passages_path: str) -> tuple[list[dict], dict[str, dict]]:
    """Return the questions of a retrieval output, and the passages by id. Raises UserError naming file, line and key."""
    passages = {passage["id"]: passage for _, passage in read_json(passages_path)}
    rows = []
    for line, row in read_json(path):
        for key in ("id", "question", "docs", "gold_docs"):
            if key not in row:
                raise UserError(f"{path}:{line}: key '{key}' is missing; give retriever.py's output for questions of "
                                "questions.py")
        if unknown := next((doc_id for doc_id in row["gold_docs"] if doc_id not in passages), None):
            raise UserError(f"{path}:{line}: key 'gold_docs': {unknown!r} is not in {passages_path}; give the "
                            "passages of these questions")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: contains no row; check the file")
    return rows, passages


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows, passages = read_questions(args.input_file, args.passages)
    rows = random.Random(args.seed).sample(rows, min(args.max_rows or len(rows), len(rows)))
    window = load_window(options_from(args, LengthOptions))
    score = None
    if args.labels == "reranker" and args.role == "reranker":
        from dynamicrag.models.reranker import load_reranker

        score = load_reranker(args.reranker).score
    whole = conversations(rows, passages, options_from(args, ConversationOptions), Prompts(args.prompts), score)
    made = [fitted.row for fitted in window.kept(whole, lambda row: [window.conversation(row)], len(rows), "conversations", args.input_file)]
    write_json(args.output_file, made)
    check_columns(args.train_recipe, args.output_file)
    window.counts("questions")
    turns = sum(len(row["history"]) + 1 for row in made)
    log.info("%s: %d conversations, %d questions", args.output_file, len(made), turns)


if __name__ == "__main__":
    run(main)
