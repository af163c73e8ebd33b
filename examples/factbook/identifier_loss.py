"""llamafactory-cli train with the loss on identifiers only: digits, None and the end of the turn, not brackets and
commas.

One of the directions of learning_curve.py. It runs in LLaMA-Factory's environment and takes the same arguments as its
command.

    .venv-train/bin/python examples/factbook/identifier_loss.py recipes/smollm2_135m/warm_up.yaml
"""

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.train.tuner import run_exp

encode_all = SupervisedDatasetProcessor._encode_data_example


def encode_identifiers(self, *args, **kwargs) -> tuple[list[int], list[int]]:
    ids, labels = encode_all(self, *args, **kwargs)
    kept = {self.tokenizer.eos_token_id, *self.tokenizer.encode("None", add_special_tokens=False), *self.tokenizer.convert_tokens_to_ids(list("0123456789"))}
    return ids, [label if label in kept else IGNORE_INDEX for label in labels]


if __name__ == "__main__":
    SupervisedDatasetProcessor._encode_data_example = encode_identifiers
    run_exp()
