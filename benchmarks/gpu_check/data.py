"""Artificial vectors and texts, and tokenizers and models with random weights. Nothing is downloaded."""

import math
import random
from itertools import accumulate
from pathlib import Path

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words(count: int, seed: int = 0) -> list[str]:
    """Return distinct words of two to four syllables."""
    rng, made = random.Random(seed), {}
    while len(made) < count:
        made["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))] = None
    return list(made)


def texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Return texts of about `length` words with word frequencies as in English. One word in ten is in no vocabulary."""
    rng, known = random.Random(seed), words(20_000)
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(known))))
    made = []
    for _ in range(count):
        chosen = rng.choices(known, cum_weights=weights, k=rng.randint(length // 2, length * 3 // 2))
        made.append(" ".join(word if rng.random() < 0.9 else word + rng.choice(SYLLABLES) + rng.choice(SYLLABLES) for word in chosen))
    return made


def bert_tokenizer(size: int):
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789?:,."
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *(f"##{syllable}" for syllable in SYLLABLES)]
    pieces = list(dict.fromkeys([*pieces, *words(20_000)]))[: max(size, len(pieces))]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=True)


def t5_tokenizer(size: int):
    from transformers import T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyzQDTR0123456789?:,."
    pieces = ["▁true", "▁false", "▁Query", "▁Document", "▁Relevant", *(f"▁{word}" for word in words(20_000)[: max(size - 200, 0)]), *SYLLABLES]
    scored = [(piece, -math.log(rank + 10)) for rank, piece in enumerate(pieces)] + [(letter, -20.0) for letter in ("▁", *letters)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0), *scored], extra_ids=0)


def random_model(kind: type, config: object, device: str):
    """Return a model with random weights, initialised on the device, because a T5-base takes seconds on a CPU."""
    import torch

    with torch.device(device):
        return kind(config)


def saved(folder: Path, model: object, tokenizer: object) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_config(dry: bool, vocabulary: int, large: bool = False, **more):
    """Return the shape of BERT-base or BERT-large; in a dry run two layers of width 64.

    With initial weights of the usual size, all texts look alike to a random model. Larger weights separate them.
    """
    from transformers import BertConfig

    width, layers = (64, 2) if dry else (1024, 24) if large else (768, 12)
    return BertConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32 if dry else width // 64,
                      intermediate_size=4 * width, initializer_range=0.3 if dry else 0.04 if large else 0.05, **more)


def passage_vectors(count: int, width: int, device: str, seed: int = 0):
    """Return unit vectors, a float16 tensor [count, width], clustered by topic like measure.vectors_like_passages."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    spread = torch.arange(1, width + 1, device=device, dtype=torch.float32) ** -0.42
    spread /= spread.norm()

    def directions(number: int):
        return spread * torch.randn(number, width, generator=generator, device=device)

    topics = 0.5 * directions(200).repeat_interleave(100, dim=0) + 0.5 * directions(20_000)
    made = torch.empty(count, width, dtype=torch.float16, device=device)
    for start in range(0, count, 100_000):
        size = min(100_000, count - start)
        which = torch.randint(len(topics), (size,), generator=generator, device=device)
        made[start : start + size] = torch.nn.functional.normalize(topics[which] + 0.7 * directions(size))
    return made


def questions_about(vectors, count: int, seed: int = 1):
    """Return unit vectors, a float32 tensor [count, width], each with a cosine of about 0.7 to one of the vectors."""
    import torch

    generator = torch.Generator(vectors.device).manual_seed(seed)
    chosen = vectors[torch.randint(len(vectors), (count,), generator=generator, device=vectors.device)].float()
    noise = torch.randn(chosen.shape, generator=generator, device=vectors.device)
    return torch.nn.functional.normalize(chosen / chosen.norm(dim=1, keepdim=True).clamp(min=1e-6) + noise / vectors.shape[1] ** 0.5)
