"""The arithmetic of scripts/forecast.py: from numbers of rows, mean lengths and rates to tokens, GPU hours and bytes."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

BYTES_A_PARAMETER = 2  # of a saved model, in bfloat16
BYTES_OF_A_CHECKPOINT = 16  # per parameter: weights twice, and the optimizer's state (recipes/llama3_8b/sft.yaml)
CHECKPOINTS = 2  # for a short time, the old one and the new one
BYTES_A_TOKEN = 4  # of a training row, which is English text


@dataclass(frozen=True)
class Rates:
    """The work of one GPU per second. `parameters` are those of the LLM."""

    parameters: float
    flops: float  # floating-point operations that reading prompts and training achieve
    generated: float  # tokens that all requests of an engine generate together
    reranked: float  # documents
    scored: float  # answers, by BERTScore

    def generating(self, read: float, written: float) -> float:
        """Return the GPU hours for prompts of `read` tokens and answers of `written` tokens.

        Reading a token takes 2 operations per parameter.
        """
        return (read * 2 * self.parameters / self.flops + written / self.generated) / 3600

    def training(self, tokens: float, adapters: bool, reference: bool = False) -> float:
        """Return the GPU hours of training.

        A token takes 2 operations per parameter forward, 2 again for gradient checkpointing, 4 backward (2 if only adapters
        are trained), and 2 in a reference model.
        """
        return tokens * (8 - 2 * adapters + 2 * reference) * self.parameters / self.flops / 3600


@dataclass(frozen=True)
class Means:
    """Mean numbers of one row: its documents and bytes, and tokens."""

    documents: float
    bytes: float
    selecting: float  # prompt of a selection
    selection: float  # a selection
    answering: float  # prompt of an answer from the chosen documents
    answer: float  # the longest answer
    taught: float  # prompt and gold answer of a training row of the generator


@dataclass(frozen=True)
class Plan:
    """How many rows of a training file go where, and how they are trained on."""

    rows: int
    labelled: bool  # by a reranker already
    expert: int
    sft: int
    dpo: int
    samples: int  # trajectories per question
    prefills: int  # prompts of selections that are read per question
    reranker_pairs: int
    generator_pairs: int
    parts: int
    sft_epochs: float
    dpo_epochs: float
    sft_adapters: bool
    dpo_adapters: bool
    reference: bool  # whether preference optimisation has a reference model


@dataclass(frozen=True)
class Cost:
    """The cost of one stage for all its rows."""

    stage: str
    rows: int = 0
    read: float = 0  # tokens of prompts
    written: float = 0  # generated tokens, at most
    trained: float = 0  # tokens, over all epochs
    hours: float = 0  # of one GPU
    kept: float = 0  # bytes on disk
    meanwhile: float = 0  # further bytes on disk until the stage has ended


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sums of all stages. `meanwhile` is what the disk holds at most beyond what is kept at the end."""
    costs = list(costs)
    sums = {field.name: sum(getattr(cost, field.name) for cost in costs) for field in fields(Cost) if field.name not in ("stage", "rows")}
    held, most = 0.0, 0.0
    for cost in costs:
        held += cost.kept
        most = max(most, held + cost.meanwhile)
    return Cost("total", **{**sums, "meanwhile": most - held})


def copies(outputs: int, parts: int) -> int:
    """Return how many times a file is on disk with `outputs` outputs: they alone, or the parts of the file, their
    outputs, and the outputs put together.
    """
    return outputs if parts == 1 else 1 + 2 * outputs


def reranking(stage: str, rows: int, documents: float, size: float, parts: int, rates: Rates) -> Cost:
    """Return the cost of scoring `documents` documents per row in a file of `size` bytes."""
    return Cost(stage, rows, hours=rows * documents / rates.reranked / 3600, kept=size * copies(1, parts))


def answering(stage: str, rows: int, read: float, written: float, size: float, selectors: int, parts: int, rates: Rates) -> Cost:
    """Return the cost of answering every row with every selector; `read` and `written` are a row's tokens in all of them.

    Every result keeps the documents of its rows.
    """
    return Cost(stage, rows, rows * read, rows * written, hours=rates.generating(rows * read, rows * written), kept=size * copies(selectors, parts))


def pair_limits(pairs: str, samples: int, questions: int, per_question: int | None, reranker: int | None, generator: int | None) -> tuple[int, int]:
    """Return the largest numbers of reranker and generator pairs, by construct_dpo.py's --pairs and its limits."""
    every = samples * (samples - 1) // 2
    wanted = every if pairs == "all" else int(pairs.partition(":")[2] or 1) ** 2
    return min(questions * min(wanted, every, per_question or every), reranker or sys.maxsize), min(questions, generator or sys.maxsize)


def training(plan: Plan, means: Means, rates: Rates) -> Iterator[Cost]:
    """Yield the costs of scripts/03_rerank.sh to scripts/08_dpo.sh."""
    size = plan.rows * means.bytes
    if not plan.labelled:
        yield reranking("03_rerank", plan.rows, means.documents, size, plan.parts, rates)
    once = plan.expert * (means.selecting + means.selection) + plan.sft * means.taught
    # the expert rows, the others, and the others again as those of SFT and DPO; then the rows of the trainer
    rows_written = plan.rows + (plan.rows - plan.expert)
    yield Cost("04_training_data", plan.rows, kept=rows_written * means.bytes + once * BYTES_A_TOKEN)
    model = rates.parameters * BYTES_A_PARAMETER

    def trained(stage: str, rows: int, tokens: float, kept: float, adapters: bool, reference: bool) -> Cost:
        checkpoints = 0 if adapters else rates.parameters * BYTES_OF_A_CHECKPOINT * CHECKPOINTS
        return Cost(stage, rows, trained=tokens, hours=rates.training(tokens, adapters, reference), kept=model + kept, meanwhile=checkpoints)

    yield trained("05_sft", plan.expert + plan.sft, once * plan.sft_epochs, 0, plan.sft_adapters, False)
    read = plan.dpo * (plan.prefills * means.selecting + plan.samples * means.answering)
    written = plan.dpo * plan.samples * (means.selection + means.answer)
    dpo_size = plan.dpo * means.bytes
    yield Cost("06_sample", plan.dpo, read, written, hours=rates.generating(read, written), kept=dpo_size * copies(1, plan.parts))
    yield Cost("07_reward", plan.dpo, hours=plan.dpo * plan.samples / rates.scored / 3600, kept=dpo_size)
    prompts = plan.reranker_pairs * (means.selecting + means.selection) + plan.generator_pairs * (means.answering + means.answer)
    pairs = plan.reranker_pairs + plan.generator_pairs
    # both sides of a pair have the prompt, which is in the file once
    yield trained("08_dpo", pairs, 2 * prompts * plan.dpo_epochs, prompts * BYTES_A_TOKEN, plan.dpo_adapters, plan.reference)
