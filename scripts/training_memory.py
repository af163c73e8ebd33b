"""The memory that a training run needs, computed from the shape of the model: used by scripts/recipes.py."""

from dataclasses import dataclass

GIB = 1 << 30
GPUS = 8  # of full training, among which ZeRO-3 divides weights, gradients and optimizer
RANK = 16
# What cards of 80 and 24 GB have, in GiB (A100 and H100; A10 and L4). A recipe may need MOST of it: these are estimates.
ROOM, MOST = {80: 79, 24: 22.5}, 0.9
# The windows to try, in eighths of the model's. With 24 GB, they are those of 40, 20, 10 or 5 documents.
WINDOWS = {80: (8, 7, 6, 5, 4), 24: (8, 4, 2, 1)}


@dataclass(frozen=True)
class Kind:
    """A recipe: its stage, its data sets, whether it trains an adapter, the bits of a quantised weight, and the card it is for."""

    stage: str  # of LLaMA-Factory
    title: str
    card: int = 80  # GB
    adapter: bool = False
    bits: int | None = None
    rewarded: str = ""  # the kind of its data sets, if a stage makes them from rewarded trajectories and it is not that of `stage`

    @property
    def data(self) -> str:
        """The kind of its data sets: sft, which trains the base model; or dpo, best_of_n or kto, which train the SFT model."""
        return self.rewarded or self.stage


KINDS = {
    "sft": Kind("sft", "Behaviour cloning: reranker and generator together, in one model"),
    "dpo": Kind("dpo", "Preference optimisation of reranker and generator from the SFT model"),
    "dpo_ftx": Kind("dpo", "DPO plus the SFT loss on the chosen side"),
    "simpo": Kind("dpo", "SimPO instead of DPO"),
    "best_of_n": Kind("sft", "SFT of reranker and generator on the best of the sampled trajectories, from the SFT model", rewarded="best_of_n"),
    "kto": Kind("kto", "KTO of reranker and generator on single outputs instead of pairs, from the SFT model"),
    "sft_lora": Kind("sft", "Behaviour cloning with LoRA", adapter=True),
    "dpo_lora": Kind("dpo", "Preference optimisation with LoRA, from the SFT model (merged, if also LoRA)", adapter=True),
    "best_of_n_lora": Kind("sft", "SFT with LoRA on the best of the sampled trajectories, from the SFT model (merged, if also LoRA)", adapter=True, rewarded="best_of_n"),
    "kto_lora": Kind("kto", "KTO with LoRA, from the SFT model (merged, if also LoRA)", adapter=True),
    "sft_qlora": Kind("sft", "Behaviour cloning with LoRA on 4-bit weights", 24, True, 4),
    "dpo_qlora": Kind("dpo", "Preference optimisation with LoRA on 4-bit weights, from the SFT model (merged, if also LoRA)", 24, True, 4),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated MLPs, under the names that config.json has for them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    tie_word_embeddings: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the seven matrices of a layer: query, key, value, output, gate, up and down."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        query, key = self.num_attention_heads * head, self.num_key_value_heads * head
        width, inner = self.hidden_size, self.intermediate_size
        return [(width, query), (width, key), (width, key), (query, width), (width, inner), (width, inner), (inner, width)]

    @property
    def linear(self) -> int:
        """Parameters of the matrices, which LoRA adapts and QLoRA quantises."""
        return self.num_hidden_layers * sum(rows * columns for rows, columns in self.matrices)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding and of the output matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def adapter(self) -> int:
        """Parameters of an adapter of rank RANK on every matrix."""
        return self.num_hidden_layers * RANK * sum(rows + columns for rows, columns in self.matrices)


def memory_of(shape: Shape, recipe: str, tokens: int, gpus: int = GPUS) -> list[tuple[str, float]]:
    """Return what a GPU holds when it needs most, at the loss of one row of `tokens` (per side), in GiB.

    Weights and gradients take 2 bytes per parameter, the optimizer 12 (float32: weights and two moments). With gradient
    checkpointing each layer keeps its input, and one layer at a time is computed again, after the logits are freed. A
    logit takes 12 bytes (bfloat16 and float32, of value and gradient), and 20 if a reference is compared with (measured
    for DPO: docs/scale.md; assumed for KTO, which computes two rows at a time).
    """
    kind = KINDS[recipe]
    compared = kind.stage in ("dpo", "kto") and recipe != "simpo"
    rows = tokens * (1 if kind.stage == "sft" else 2)
    parameters = shape.linear + shape.embedding
    parts = {}
    if not kind.adapter:
        parts[f"weights, gradients and optimizer of {parameters / 1e9:.2f} billion parameters, on {gpus} GPUs"] = 16 * parameters / gpus
        if compared:
            parts[f"weights of the reference, on {gpus} GPUs"] = 2 * parameters / gpus
        parts["embedding and output matrix, gathered"] = 2 * shape.embedding
    else:
        weights = 2 * parameters if not kind.bits else (kind.bits / 8 + 1 / 64 + 4 / (64 * 256)) * shape.linear + 2 * shape.embedding
        parts[f"weights of {parameters / 1e9:.2f} billion parameters{', the embeddings in bfloat16' if kind.bits else ''}"] = weights
        parts[f"adapter of {shape.adapter / 1e6:.0f} million parameters, its gradient and optimizer (float32)"] = 16 * shape.adapter
    parts[f"inputs of {shape.num_hidden_layers} layers"] = 2 * rows * shape.num_hidden_layers * shape.hidden_size
    logits = (20 if compared else 12) * rows * shape.vocab_size
    layer = 2 * 2 * rows * (4 * shape.intermediate_size + 8 * shape.hidden_size)
    if logits >= layer:
        parts[f"logits over {shape.vocab_size:,} tokens, {20 if compared else 12} bytes each"] = logits
    else:
        parts["one layer, computed again"] = layer
    parts["CUDA and its buffers"] = GIB
    return [(name, size / GIB) for name, size in parts.items()]


def total_of(*asked) -> float:
    """Return the sum of memory_of()."""
    return sum(size for _, size in memory_of(*asked))


def window_of(shape: Shape, recipe: str, longest: int) -> int | None:
    """Return the largest window up to `longest` tokens with which a recipe fits its card; None if none does."""
    card = KINDS[recipe].card
    for eighths in WINDOWS[card]:
        tokens = longest * eighths // 8
        if total_of(shape, recipe, tokens) <= MOST * ROOM[card]:
            return tokens
    return None
