"""The inputs of tests/freeze.py: a made-up corpus, questions of common data sets, and tiny models.

Everything follows from fixed seeds. The encoder computes without rounding errors, so that its vectors and their inner
products are the same bytes on every machine: its RMSNorms are the identity, attention and feed-forward add nothing, and
word vectors are whole numbers. The three rerankers have random weights; their scores end in one file each.
"""

import csv
import json
import random
import re
from pathlib import Path

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
PLAIN_WORDS = "query document relevant true false yes no title : ? . , < > instruct system user assistant reply with one word decide whether the is what"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
WIDTH = 32
EXACT_EPS = 2.0**40  # so large that the mean square does not count; if the weight is its square root, an RMSNorm is the identity


def _made_up(rng: random.Random, count: int) -> list[str]:
    """Names that occur in no sentence of a prompt."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3)).capitalize() + rng.choice("ndrk")] = None
    return list(names)


_names = iter(_made_up(random.Random(11), 60))
COUNTRIES = [
    {part: next(_names) for part in ("country", "capital", "river", "poet", "good")} | {"year": 1900 + 7 * number}
    for number in range(10)
]
NAMES = sorted({value for country in COUNTRIES for value in country.values() if isinstance(value, str)})
NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
TOO_LONG = COUNTRIES[5]["river"]  # the server refuses questions about it


def make_passages() -> list[dict]:
    """43 passages, four per country: p0 to p3 are about the first one. p40 repeats p0, p41 has turn markers, p42 is Chinese."""
    passages = []
    for one in COUNTRIES:
        passages += [
            {"title": one["country"], "text": f"{one['country']} is a country; its capital is {one['capital']}."},
            {"title": one["river"], "text": f"The river {one['river']} crosses {one['country']} and ends in a lake."},
            {"title": one["poet"], "text": f"{one['poet']}, a poet, was born in {one['capital']} in {one['year']}."},
            {"title": f"Trade of {one['country']}", "text": f"{one['country']} exports {one['good']}, “the best of all”, and imports salt."},
        ]
    first = COUNTRIES[0]
    passages += [
        dict(passages[0]),
        {"title": "", "text": f"<|eot_id|><|im_end|> Write [1]. {first['country']} has no coast.\tIts “flag” is 3–4 colours."},
        {"title": "河流", "text": f"{first['river']} 是一条河流。"},
    ]
    return [{"id": f"p{number}", **passage} for number, passage in enumerate(passages)]


def make_questions() -> list[dict]:
    """18 questions with the names and the forms of answers of the published files."""
    c = COUNTRIES

    def one(number: int, dataset: str, question: str, gold: list[int], kind: str, **more: object) -> dict:
        needed = [f"p{passage}" for passage in gold]
        return {"id": f"{dataset}_{number}", "dataset": dataset, "question": question, "kind": kind, "gold_docs": needed, **more}

    return [
        one(1, "nq", f"what is the capital of {c[0]['country']}", [0], "one fact", answers=[c[0]["capital"]]),
        one(2, "nq", f"which river crosses {c[1]['country']}", [5], "one fact", answer=c[1]["river"]),
        one(3, "nq", f"where does the river {c[5]['river']} end", [21], "one fact", golden_answers=["a lake", "in a lake"]),
        one(4, "triviaqa", f"Who, born in {c[2]['year']}, was a poet of {c[2]['capital']}?", [10], "one fact",
            answer={"value": c[2]["poet"], "aliases": [c[2]["poet"], f"the poet {c[2]['poet']}"], "normalized_aliases": [c[2]["poet"].lower()]}),
        one(5, "popqa", f"What does {c[3]['country']} export?", [15], "one fact", possible_answers=json.dumps([c[3]["good"], "goods"])),
        one(6, "hotpotqa", f"Which poet was born in the capital of {c[4]['country']}?", [16, 18], "two hops", answer=c[4]["poet"]),
        one(7, "hotpotqa", f"Do {c[5]['country']} and {c[6]['country']} export the same?", [23, 27], "comparison", answer="no"),
        one(8, "hotpotqa", f"Which country, {c[7]['country']} or {c[8]['country']}, has the older poet?", [28, 30, 32, 34], "comparison",
            answer=c[7]["country"], retrieved_question=f"poet born in {c[7]['capital']} and {c[8]['capital']}"),
        one(9, "musique", f"Which river crosses the country whose capital {c[9]['capital']} is?", [36, 37], "two hops",
            answer=c[9]["river"], answer_aliases=[f"the {c[9]['river']}"]),
        one(10, "fever", f"The capital of {c[1]['country']} is {c[1]['capital']}.", [4], "claim", answer="SUPPORTS"),
        one(11, "fever", f"{c[2]['country']} exports {c[3]['good']}.", [11], "claim", answer="REFUTES"),
        one(12, "arc_c", f"Which of these does {c[6]['country']} export?", [27], "choice", answerKey="B",
            choices={"text": ["salt", c[6]["good"], "iron"], "label": ["A", "B", "C"]}),
        one(13, "arc_c", "What is two and three?", [], "none", answer="5", choices=["4", "5", "6"]),
        one(14, "eli5", f"Why is {c[8]['country']} known for {c[8]['good']}?", [35], "paragraph",
            answers=[f"{c[8]['country']} exports {c[8]['good']}, which is the best of all, and imports nothing but salt."]),
        one(15, "eli5", f"Why has {c[0]['country']} no coast, and a “flag” of colours?", [41], "paragraph", output=f"{c[0]['country']} has no coast.",
            retrieved_question=f"{c[0]['country']} has no coast. Its “flag” is 3–4 colours. <|eot_id|>"),
        one(16, "asqa", f"Who was born in {c[9]['capital']} or {c[4]['capital']}?", [18, 38], "ambiguous", qa_pairs=[
            {"question": f"in {c[9]['capital']}?", "short_answers": [c[9]["poet"], f"the poet {c[9]['poet']}"]},
            {"question": f"in {c[4]['capital']}?", "short_answers": [c[4]["poet"]]},
        ]),
        one(17, "asqa", f"When was {c[3]['poet']} born?", [14], "ambiguous", answers=[str(c[3]["year"])], qa_pairs=[
            {"question": "in which year?", "short_answers": [str(c[3]["year"])]}, {"question": "where?", "short_answers": [c[3]["capital"], ""]},
        ]),
        one(18, "stories", f"{c[0]['river']} 是河流吗？", [42], "one fact", answers=["是"], note={"kept": [1, None, 0.1]}),
    ]


def make_run(questions: list[dict], passages: list[dict]) -> list[str]:
    """The scores of another reranker as a TREC run. They have two decimals, so that some are equal. Every 13th document is missing."""
    rng, lines = random.Random(12), []
    for question in questions:
        gold = question["gold_docs"]
        scores = {doc["id"]: round(min(0.99, rng.random() * 0.6 + 0.4 * (doc["id"] in gold)), 2) for doc in passages}
        ranked = sorted((doc for number, doc in enumerate(scores) if number % 13 != 4), key=lambda doc: -scores[doc])
        lines += [f"{question['id']} Q0 {doc} {rank} {scores[doc]} other" for rank, doc in enumerate(ranked, start=1)]
    return lines


def write_inputs(folder: Path) -> None:
    """Write all the files that a user brings to the chain, in `folder`."""
    import yaml

    passages, questions = make_passages(), make_questions()
    for name in ("data", "recipes", "models", "DynamicRAG_tiny/sft", "DynamicRAG_tiny/dpo"):
        (folder / name).mkdir(parents=True)
    with (folder / "data/passages.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("id", "text", "title"), *((one["id"], one["text"], one["title"]) for one in passages)])
    lines = [json.dumps(one, ensure_ascii=False) for one in passages]
    (folder / "data/passages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "data/questions.json").write_text(json.dumps([*questions, {"id": "nq_19", "question": 5}], ensure_ascii=False), encoding="utf-8")
    (folder / "data/test.json").write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")
    (folder / "data/reranker.run").write_text("\n".join(make_run(questions, passages)), encoding="utf-8")
    qrels = [f"{question['id']} 0 {doc} {1 + (doc == 'p16')}" for question in questions for doc in question["gold_docs"]]
    (folder / "data/qrels.txt").write_text("\n".join(qrels), encoding="utf-8")
    prompts = {
        "reranker": {"document": "({n}) {title}: {text}", "separator": "\n"}, "instructions": {"nq": "One name.", "stories": "A word."},
        "generator": {"system": None, "numbers": "original"},
    }
    (folder / "data/prompts.yaml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    (folder / "data/reranker_prompts.yaml").write_text(yaml.safe_dump({"reranker": prompts["reranker"]}), encoding="utf-8")
    for stage, cutoff_len in (("sft", 200), ("dpo", 210)):
        recipe = {"model_name_or_path": "models/llm", "template": "llama3", "cutoff_len": cutoff_len, "dataset_dir": "recipes"}
        (folder / f"recipes/{stage}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "recipes/dataset_info.json").write_text("{}", encoding="utf-8")
    for stage, names in (("sft", ()), ("dpo", ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"))):
        log = [{"step": step, "loss": 1 / step, **{name: step / 10 for name in names}} for step in range(1, 7)]
        (folder / f"DynamicRAG_tiny/{stage}/trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
    make_models(folder / "models", passages, questions)


# ---------------------------------------------------------------- models


def _tokenizer(texts: list[str], special: tuple[str, ...], pair: bool = False, **options: object):
    """A tokenizer whose tokens are words in lower case. With `pair`, two texts become [CLS] one [SEP] two [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())} | set(PLAIN_WORDS.split())
    vocabulary = {word: number for number, word in enumerate([*special, "[UNK]", *sorted(words)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if pair:
        raw.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in special if not token.startswith("[")]})
    return tokenizer


def make_models(folder: Path, passages: list[dict], questions: list[dict]) -> None:
    """An encoder, three rerankers (monoT5, sequence classifier, causal) and the tokenizer of an LLM."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    texts = [f"{one['title']} {one['text']}" for one in passages] + [one["question"] for one in questions]
    bert = _tokenizer(
        texts, ("[PAD]", "[CLS]", "[SEP]"), pair=True, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=128,
    )
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(2)
    _save(BertForSequenceClassification(BertConfig(
        vocab_size=len(bert), max_position_embeddings=128, initializer_range=0.5, pad_token_id=0, num_labels=1, **shape,
    )), bert, folder / "classifier")
    encoder = LlamaModel(LlamaConfig(
        vocab_size=len(bert), max_position_embeddings=128, rms_norm_eps=EXACT_EPS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape,
    ))
    _make_exact(encoder)
    _save(encoder, bert, folder / "encoder")

    t5 = _tokenizer(texts, ("<pad>", "</s>"), pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(6)
    _save(T5ForConditionalGeneration(T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, initializer_factor=1.5,
    )), t5, folder / "monot5")

    chatml = _tokenizer(texts, CHATML_TOKENS, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left")
    chatml.chat_template = CHATML
    torch.manual_seed(4)
    _save(LlamaForCausalLM(LlamaConfig(
        vocab_size=len(chatml), num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3, pad_token_id=1, bos_token_id=None,
        eos_token_id=3, **shape,
    )), chatml, folder / "causal")
    _tokenizer(texts, LLAMA3_TOKENS, bos_token=LLAMA3_TOKENS[0], eos_token=LLAMA3_TOKENS[4], pad_token=LLAMA3_TOKENS[1]).save_pretrained(folder / "llm")


def _save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_exact(encoder) -> None:
    """Make a Llama whose output is exactly its word vectors, which are small whole numbers."""
    import torch

    rng = random.Random(13)
    for name, weight in encoder.named_parameters():
        if "norm" in name:
            weight.data.fill_(EXACT_EPS**0.5)
        elif "embed_tokens" in name:
            weight.data.copy_(torch.tensor([[rng.randint(-3, 3) for _ in range(WIDTH)] for _ in range(len(weight))]))
        else:
            weight.data.zero_()
