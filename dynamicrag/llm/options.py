"""What the LLM is and what it is asked, as values: stages fill them from flags (stage.options_from), other code directly."""

from dataclasses import dataclass
from typing import Literal

from dynamicrag.llm.templates import AUTO


@dataclass(frozen=True)
class EngineOptions:
    """A model and how it runs: the flags of engine.add_engine_flags, which describe them."""

    llm_model: str
    template: str = AUTO
    enable_thinking: str | None = None  # "on" or "off"; None: off, or a server's default
    api_base: str | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None  # in tokens; None: see engine.window_of
    gpu_memory_utilization: float = 0.9
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


@dataclass(frozen=True)
class CallOptions:
    """The requests of a run: the flags of requests.add_call_flags, which describe them, and --seed."""

    prompts: str | None = None
    reranker_model: str | None = None
    reranker_template: str | None = None
    selection_temperature: float = 0.0
    selection_max_tokens: int = 100
    answer_max_tokens: int | None = None  # None: that of the row's data set
    constrain_ids: str = "on"  # or "off"
    answer_order: str = "selection"  # or "retrieval"
    dataset: str | None = None
    chunk_size: int = 2000
    seed: int = 42
