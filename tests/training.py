"""What trainings of a tiny Llama have in common: settings, losses and weights."""

import json
from pathlib import Path

SETTINGS = (
    "model_name_or_path=models/tiny-llama flash_attn=sdpa bf16=false cutoff_len=512 preprocessing_num_workers=1 "
    "logging_steps=1 learning_rate=1e-3 num_train_epochs=1 plot_loss=false"
).split()


def losses_of(output: Path) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def weights_of(output: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(output / "model.safetensors")


def largest_difference(one: dict, other: dict) -> float:
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in other.items()}
    return max((one[name] - other[name]).abs().max().item() for name in one)
