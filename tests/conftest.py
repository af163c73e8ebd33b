"""Tiny models, made here: random weights, their own vocabulary, a fraction of a second each.

They compute with the same code as the real ones; what they compute is noise, which is enough to compare against.
"""

import csv
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from warm import Warm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Each worker and its processes get cores of their own: threads of two processes that share cores wait for each other.
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])

def pytest_collection_modifyitems(items):
    """Files whose tests start an engine or a trainer come first: the processes of a parallel run then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# Stages that only score: every row counts, and measures are always rewritten, so they have neither --on_error nor --overwrite.
SCORERS = ("evaluate", "evaluate_retrieval")
WORDS = (
    "river mountain country population export import capital border area climate oil gas farming religion language "
    "president court election which of the longest has true false Query Document Relevant Title : ?"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyzéü0123456789"


def make_text(rng: random.Random, least: int = 3, most: int = 40) -> str:
    return " ".join(rng.choices(WORDS[:18], k=rng.randint(least, most)))


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|unused|>", "<|im_end|>")


def make_tiny_llama(folder: Path, special: tuple[str, ...] = LLAMA3_TOKENS) -> None:
    """A Llama of width 128 with random weights, and a byte-level tokenizer with its template's special tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    rng = random.Random(0)
    texts = [f"[{n}] Title {n}\n{make_text(rng)} [{n}], " for n in range(300)]
    raw.train_from_iterator(texts, vocab_size=700, special_tokens=list(special), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, bos_token=special[0], eos_token=special[4], pad_token=special[1]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=0, eos_token_id=4, pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _lookaheads(values: tuple[object, ...]) -> str:
    """One for each value: as a word of its own, and a number not as part of another or of a quoted text."""
    found = []
    for value in values:
        near = r"\w'\"" if isinstance(value, int | float) else r"\w"
        found.append(rf"(?=.*(?<![{near}])(?<!\d[.,]){re.escape(str(value))}(?![{near}]|[.,]\d))")
    return "".join(found)


def naming(*values: object) -> str:
    """A pattern for a message that names each value (key, number, file, flag), whatever it says of them."""
    return f"(?s)^{_lookaheads(values)}"


def at(place: str | Path, *values: object) -> str:
    """One for a message that begins with its place (a file in any folder, and the line, row or key in it; a flag), and then names the values."""
    return rf"(?s)^(?:error: )?(?:\S*/)?{re.escape(str(place))}: {_lookaheads(values)}"


def names(text: str, *values: object) -> bool:
    """Whether a text names each value."""
    return re.search(naming(*values), text) is not None


def logged(caplog, *values: object, level: str = "WARNING") -> int:
    """How many records of the level name each value."""
    return sum(record.levelname == level and names(record.getMessage(), *values) for record in caplog.records)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests measure nothing: they leave the other cores to others, and sums do not depend on a thread count."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm():
    """Processes that start with their heavy modules imported (tests/warm.py)."""
    with Warm() as servers:
        yield servers


@pytest.fixture(autouse=True)
def encoding_in_this_process(monkeypatch):
    """The retriever encodes in a process of its own, whose start takes longer than most tests; test_kill.py has the real thing."""
    import retriever

    monkeypatch.setattr(retriever, "process_of_its_own", lambda: ThreadPoolExecutor(1))


def _bert_tokenizer():
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str.lower, WORDS), *LETTERS, *(f"##{c}" for c in LETTERS)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def _bert_config(vocab_size: int, **changes):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.5, **changes,
    )


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory) -> Path:
    """A BERT of width 32."""
    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = _bert_tokenizer()
    torch.manual_seed(1)
    BertModel(_bert_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cross_encoder_dirs(tmp_path_factory) -> dict[int, Path]:
    """BERT classifiers with one label and with two."""
    import torch
    from transformers import BertForSequenceClassification

    folders = {}
    for labels in (1, 2):
        folders[labels] = tmp_path_factory.mktemp(f"cross_encoder_{labels}")
        tokenizer = _bert_tokenizer()
        torch.manual_seed(2)
        BertForSequenceClassification(_bert_config(len(tokenizer), num_labels=labels)).save_pretrained(folders[labels])
        tokenizer.save_pretrained(folders[labels])
    return folders


@pytest.fixture(scope="session")
def monot5_dir(tmp_path_factory) -> Path:
    """A T5 of width 32, with a unigram vocabulary trained on our words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=list(LETTERS)
    )
    raw.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    vocab = dict(json.loads(raw.to_str())["model"]["vocab"])
    vocab = list({**vocab, "▁true": -2.0, "▁false": -2.0}.items())  # single tokens, as in every T5
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    folder = tmp_path_factory.mktemp("monot5")
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        initializer_factor=3.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus() -> list[dict]:
    """120 passages, several of them with the same text."""
    rng = random.Random(7)
    passages = [{"id": f"p{number}", "title": f"Title {number % 9}", "text": make_text(rng)} for number in range(120)]
    passages[40]["text"], passages[40]["title"] = passages[3]["text"], passages[3]["title"]
    return passages


@pytest.fixture(scope="session")
def corpus_tsv(tmp_path_factory, corpus) -> Path:
    """The corpus as DPR publishes one."""
    path = tmp_path_factory.mktemp("corpus") / "passages.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([passage["id"], passage["text"], passage["title"]] for passage in corpus)
    return path


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory, encoder_dir, corpus_tsv) -> Path:
    """The corpus embedded, in two shards."""
    import generate_passage_embeddings

    folder = tmp_path_factory.mktemp("shards")
    for shard in (0, 1):
        generate_passage_embeddings.main([
            "--model_name_or_path", str(encoder_dir), "--passages", str(corpus_tsv), "--output_dir", str(folder),
            "--shard_id", str(shard), "--num_shards", "2", "--dtype", "float32", "--device", "cpu",
        ])
    return folder
