"""Tokenizers for each chat template, and the Python environment of LLaMA-Factory."""

import json
from pathlib import Path

from stages import REPO

TRAIN_PYTHON = REPO / ".venv-train/bin/python"
TEXTS = [
    "Question: Which river is the longest?\n\n[1] River\nThe Nile, {title}. [1]\n\nWrite their identifiers.",
    "None of the documents [2], [1]. São Tomé costs 3 % more.", "You choose the documents that are needed.",
]
SPECIAL = {
    "llama2": ("<s>", "</s>", []),
    "llama3": (
        "<|begin_of_text|>", "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "mistral_v1": ("<s>", "</s>", []),
    "smollm2": ("<|im_start|>", "<|im_end|>", ["<|endoftext|>"]),
    "smollm2_real": ("<|im_start|>", "<|im_end|>", []),
}


def byte_level(special: list[str]):
    """The kind of Llama 3 and SmolLM2. It puts a beginning-of-text token before every text unless it is told not to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return raw


def sentencepiece_like(special: list[str], prepend_always: bool):
    """The kind of Llama 2, which puts a space before every piece between special tokens, and of Mistral v0.3, which puts one before the text only."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, "<unk>", *bytes_], show_progress=False)
    raw.train_from_iterator(TEXTS * 3, trainer)
    fresh = json.loads(raw.to_str())
    fresh["added_tokens"] = [token for token in fresh["added_tokens"] if token["content"] not in bytes_]
    raw = Tokenizer.from_str(json.dumps(fresh))
    if prepend_always:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.pre_tokenizer = None
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return raw


def save_tokenizer(name: str, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bos, eos, others = SPECIAL[name]
    special = [bos, eos, *others]
    if name in ("llama3", "smollm2"):
        raw = byte_level(special)
    else:
        raw = sentencepiece_like(special, prepend_always=name != "mistral")
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos).save_pretrained(folder)


CASES = {
    "llama2": "llama2", "llama3": "llama3", "mistral": "mistral", "mistral_v1": "mistral", "smollm2": "smollm2",
    "smollm2_real": "smollm2",
}
