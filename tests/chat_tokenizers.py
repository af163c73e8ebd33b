"""Tokenizers and tiny models of each family of chat template, and the Python environment of LLaMA-Factory."""

import json
from pathlib import Path

import yaml
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
    # The models of recipes/models: Qwen's have no beginning of text.
    "llama31_8b": ("<|begin_of_text|>", "<|eot_id|>", ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]),
    "mistral_7b": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "qwen25_7b": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|object_ref_start|>"]),
    "qwen3_8b": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|object_ref_start|>"]),
}
FAMILIES = ("llama31_8b", "mistral_7b", "qwen25_7b", "qwen3_8b")
# The special parts of their own chat templates: Llama 3.1's writes the date, Qwen3's has a switch for reasoning.
CHATML = "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
OWN_TEMPLATES = {
    "llama31_8b": (
        "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn['role'] }}<|end_header_id|>\n\n"
        "{% if turn['role'] == 'system' %}Today: {{ date_string }}\n\n{% endif %}{{ turn['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen25_7b": CHATML + "{% endif %}",
    "qwen3_8b": CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
}


KINDS = {  # model type, and what sets its architecture apart
    "llama31_8b": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }}),
    "mistral_7b": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen25_7b": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3_8b": ("qwen3", {"head_dim": 32}),
}


def facts_of(model: str) -> dict:
    return yaml.safe_load((REPO / f"recipes/models/{model}.yaml").read_text(encoding="utf-8"))


def byte_level(special: list[str], bos: str | None, digits: int | None = None):
    """The kind of Llama 3, SmolLM2 and Qwen. It puts `bos`, if any, before every text unless it is told not to.

    A token has at most `digits` digits: 3 in Llama 3.1, 1 in Qwen.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        apart = pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}| ?\p{{L}}+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
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
    special = [*filter(None, (bos, eos)), *others]
    if name in ("llama3", "smollm2", "llama31_8b", "qwen25_7b", "qwen3_8b"):
        raw = byte_level(special, bos, {"llama31_8b": 3, "qwen25_7b": 1, "qwen3_8b": 1}.get(name))
    else:
        raw = sentencepiece_like(special, prepend_always=not name.startswith("mistral") or name == "mistral_v1")
    if name == "qwen3_8b":
        raw.add_tokens(["<think>", "</think>"])  # tokens, but not special ones
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos).save_pretrained(folder)


CASES = {
    "llama2": "llama2", "llama3": "llama3", "mistral": "mistral", "mistral_v1": "mistral", "smollm2": "smollm2",
    "smollm2_real": "smollm2", **{model: facts_of(model)["template"] for model in FAMILIES},
}


def make_tiny(model: str, folder: Path) -> None:
    """A model of width 64 with two layers of its family's kind, with the tokenizer and the chat template of its form."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    save_tokenizer(model, folder)
    if own := OWN_TEMPLATES.get(model):
        (folder / "chat_template.jinja").write_text(own)
    tokenizer, (kind, more) = AutoTokenizer.from_pretrained(folder), KINDS[model]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.2,  # so that an adapter alone, beside fixed embeddings, can learn an answer
        max_position_embeddings=32768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
