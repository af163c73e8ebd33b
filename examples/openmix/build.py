"""Build openmix, the data of experiments/openqa.sh, from the published files of its five data sets.

| file | published by |
|---|---|
| nq-open-oracle.jsonl.gz            | github.com/nelson-liu/lost-in-the-middle, folder qa_data |
| hotpot_dev_distractor_v1.json      | hotpotqa.github.io |
| 2wikimultihop_dev.json             | github.com/Alab-NII/2wikimultihop: dev.json of its data archive, renamed |
| musique_ans_v1.0_dev.jsonl         | github.com/StonyBrookNLP/musique |
| SVAMP.json                         | github.com/arkilpatel/SVAMP |

The questions of each set are drawn and divided by a hash of their ids (SIZES). A train or dev question that shares a
needed passage or its wording with a test question is left out. --ids gives the ids of each part instead. The corpus has
all documents of the questions, and the annotated passages of all questions of Natural Questions.

Reads    SOURCE_DIR                                   the five files, .gz or not
Writes   OUTPUT_DIR/{train,dev,test}.jsonl            rows with id, dataset, kind, question, answers, gold_docs, and docs where a set has them
         OUTPUT_DIR/passages.jsonl                    id, title, text

    python examples/openmix/build.py --source_dir data/openmix_sources --output_dir data/openmix
"""

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.stage import UserError, derive_seed, log

# Questions of each data set in train, dev and test; fewer if the overlap with test leaves fewer.
SIZES = {"nq": (1750, 260, 340), "hotpotqa": (480, 285, 345), "2wikimultihopqa": (480, 0, 80), "musique": (100, 0, 120), "svamp": (615, 95, 150)}
PARTS = ("train", "dev", "test")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--source_dir", required=True, help="folder of the published files")
    parser.add_argument("--output_dir", required=True, help="folder of openmix")
    parser.add_argument("--ids", help="folder with train.txt, dev.txt and test.txt: the ids of each part, one per line")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the authors' files


def plain(text: str) -> str:
    """Return the text with single spaces."""
    return " ".join(text.split())


def passage(title: str, text: str) -> dict[str, str]:
    """Return a passage. Its id is a hash of its content, so that the same passage of two data sets is one."""
    title, text = plain(title), plain(text)
    return {"id": hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:12], "title": title, "text": text}


def natural_questions(number: int, entry: Mapping) -> dict:
    """A row of lost-in-the-middle's oracle file: its one document is the annotated passage. The id is the line number, from 0."""
    needed = [passage(doc["title"], doc["text"]) for doc in entry["ctxs"] if doc.get("isgold", True)]
    return {"id": f"nq_{number}", "kind": "one", "question": entry["question"], "answers": entry["answers"], "needed": needed}


def paragraphs(entry: Mapping) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return all paragraphs of a row in HotpotQA's form, and those of the supporting facts."""
    supporting = {title for title, _ in entry["supporting_facts"]}
    docs = [(title, passage(title, " ".join(sentences))) for title, sentences in entry["context"]]
    return [doc for _, doc in docs], [doc for title, doc in docs if title in supporting]


def hotpotqa(number: int, entry: Mapping) -> dict:
    docs, needed = paragraphs(entry)
    return {"id": f"hotpotqa_{entry['_id']}", "kind": entry["type"], "question": entry["question"], "answers": [entry["answer"]], "docs": docs, "needed": needed}


def two_wiki(number: int, entry: Mapping) -> dict:
    return hotpotqa(number, entry) | {"id": f"2wiki_{entry['_id']}"}


def musique(number: int, entry: Mapping) -> dict:
    docs = [passage(paragraph["title"], paragraph["paragraph_text"]) for paragraph in entry["paragraphs"]]
    needed = [doc for doc, paragraph in zip(docs, entry["paragraphs"], strict=True) if paragraph["is_supporting"]]
    answers = list(dict.fromkeys([entry["answer"], *entry["answer_aliases"]]))
    return {"id": f"musique_{entry['id']}", "kind": entry["id"].partition("__")[0], "question": entry["question"], "answers": answers, "docs": docs, "needed": needed}


def svamp(number: int, entry: Mapping) -> dict:
    body, value = entry["Body"].strip(), float(entry["Answer"])
    answer = str(int(value)) if value.is_integer() else str(value)
    question = plain(f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {entry['Question']}")
    return {"id": f"svamp_{entry['ID']}", "kind": entry["Type"].lower(), "question": question, "answers": [answer], "needed": []}


SOURCES: dict[str, tuple[str, Callable[[int, Mapping], dict]]] = {
    "nq": ("nq-open-oracle.jsonl", natural_questions), "hotpotqa": ("hotpot_dev_distractor_v1.json", hotpotqa),
    "2wikimultihopqa": ("2wikimultihop_dev.json", two_wiki), "musique": ("musique_ans_v1.0_dev.jsonl", musique), "svamp": ("SVAMP.json", svamp),
}


def read_source(folder: Path, dataset: str) -> Iterator[dict]:
    """Yield the rows of a data set. Raises UserError naming a missing file, or the entry and the key that is not as published."""
    name, convert = SOURCES[dataset]
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder / name}: does not exist, and neither does {name}.gz; the head of examples/openmix/build.py names its publisher")
    for number, (place, entry) in enumerate(entries(path)):
        try:
            row = convert(number, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}:{place}: {type(error).__name__} {error}: not in the published form; get the file again") from error
        docs = list({doc["id"]: doc for doc in row.get("docs", ())}.values())
        gold = list(dict.fromkeys(doc["id"] for doc in row["needed"]))
        yield {**row, "dataset": dataset, "gold_docs": gold, **({"docs": docs} if docs else {})}


def entries(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield line or number, and entry, of a JSON or JSONL file, gzipped or not."""
    if path.suffix == ".gz" and path.with_suffix("").suffix == ".json":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from enumerate(json.load(file), start=1)
    else:
        yield from read_json(path)


# ---------------------------------------------------------------- parts


def drawn(rows: Sequence[dict], sizes: Sequence[int], seed: int) -> dict[str, list[dict]]:
    """Return the parts of one data set: test first, then dev, then train, in the order of a hash of the ids."""
    train, dev, test = sizes
    order = sorted(rows, key=lambda row: (derive_seed(seed, "openmix", row["id"]), row["id"]))
    return {"test": order[:test], "dev": order[test : test + dev], "train": order[test + dev : test + dev + train]}


def listed(rows: Sequence[dict], folder: Path) -> dict[str, list[dict]]:
    """Return the parts that the files of --ids name, in their order. Raises UserError if a question of another name is listed."""
    by_id = {row["id"]: row for row in rows}
    parts = {}
    for part in PARTS:
        ids = (folder / f"{part}.txt").read_text(encoding="utf-8").split()
        if unknown := next((row_id for row_id in ids if row_id not in by_id), None):
            raise UserError(f"{folder / part}.txt: {unknown} is no question of the published files; check the versions of the files")
        parts[part] = [by_id[row_id] for row_id in ids]
    return parts


def apart(parts: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """Return the parts without the train and dev questions that share a needed passage or their wording with a test question, and
    without train questions that share their wording with a dev question.
    """
    passages = {doc_id for row in parts["test"] for doc_id in row["gold_docs"]}
    wordings = {wording(row) for row in parts["test"]}
    dev = [row for row in parts["dev"] if not passages & {*row["gold_docs"]} and wording(row) not in wordings]
    of_dev = wordings | {wording(row) for row in dev}
    train = [row for row in parts["train"] if not passages & {*row["gold_docs"]} and wording(row) not in of_dev]
    return {"train": train, "dev": dev, "test": parts["test"]}


def wording(row: Mapping) -> str:
    return plain("".join(character if character.isalnum() else " " for character in row["question"].casefold()))


def published(rows: Iterable[Mapping]) -> Iterator[dict]:
    """Yield the rows as they are written: without the texts of needed passages."""
    for row in rows:
        yield {key: row[key] for key in ("id", "dataset", "kind", "question", "answers", "docs", "gold_docs") if key in row}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    source, output = Path(args.source_dir), Path(args.output_dir)
    every = {dataset: list(read_source(source, dataset)) for dataset in SOURCES}
    if args.ids:
        parts = listed([row for rows in every.values() for row in rows], Path(args.ids))
    else:
        by_set = [drawn(rows, SIZES[dataset], args.seed) for dataset, rows in every.items()]
        parts = apart({part: [row for of_set in by_set for row in of_set[part]] for part in PARTS})
    corpus: dict[str, dict] = {}
    for row in [*every["nq"], *(row for rows in parts.values() for row in rows)]:
        corpus |= {doc["id"]: doc for doc in (*row["needed"], *row.get("docs", ()))}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "passages.jsonl", corpus.values())
    for part, rows in parts.items():
        write_json(output / f"{part}.jsonl", published(rows))
        counts = Counter(row["dataset"] for row in rows)
        log.info("%s: %d questions: %s", part, len(rows), ", ".join(f"{name} {counts[name]}" for name in SIZES if counts[name]))
    log.info("%s: %d passages", output / "passages.jsonl", len(corpus))


if __name__ == "__main__":
    stage.run(main)
