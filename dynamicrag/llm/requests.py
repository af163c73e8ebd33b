"""The two LLM calls of DynamicRAG: select documents, then answer from them.

All requests of sampling, inference and top-N inference are built here.
"""

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from dynamicrag.llm.completion import Completion, Request
from dynamicrag.llm.completion_cache import CompletionCache
from dynamicrag.llm.engine import ApiEngine, VllmEngine, load_engine, resolve_model
from dynamicrag.llm.model_files import prompts_for, pull
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.prompts import Prompts, add_prompts_flag
from dynamicrag.llm.templates import in_threads
from dynamicrag.models.chat_templates import Messages
from dynamicrag.rows.identifiers import Notation, Selection, ids_pattern, parse_ids
from dynamicrag.rows.row import Doc, Row
from dynamicrag.rows.tasks import task_of_row
from dynamicrag.stage import UserError, derive_seed, log


def add_call_flags(parser: ArgumentParser, in_chunks: bool = True) -> None:
    """Add the flags of every stage in which an LLM selects documents, with --chunk-size if it works `in_chunks`."""
    group = parser.add_argument_group("calls")
    add_prompts_flag(group)
    group.add_argument("--reranker-model", help="checkpoint that selects documents (default: the generator itself)")
    group.add_argument("--reranker-template", help="chat template of that checkpoint (default: that of the generator)")
    group.add_argument("--selection-temperature", type=float, default=0.0,
                       help="temperature of selections; sampled trajectories use --temperature")
    group.add_argument("--selection-max-tokens", type=int, default=100,
                       help="maximum tokens of a selection; a model that reasons first needs more")
    group.add_argument(
        "--answer-max-tokens",
        type=int, help="maximum tokens of an answer (default: depends on the data set, dynamicrag/rows/tasks.py)"
    )
    group.add_argument(
        "--constrain-ids", choices=["on", "off"], default="on",
        help="restrict selections to None or identifiers of the documents shown (a server that separates a model's "
             "reasoning restricts only the text after it)",
    )
    group.add_argument("--answer-order", choices=["selection", "retrieval"], default="selection",
                       help="order of the documents for the answer: as selected, or as retrieved, so that a set of documents has one answer")
    group.add_argument("--dataset", help="data set of every row; overrides the rows")
    if in_chunks:
        group.add_argument("--chunk-size", type=int, default=2000,
                           help="questions per batch; results are written to disk after each batch")


class Window(Protocol):
    """An engine or a trainer with a limit of tokens."""

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for max_tokens."""
        ...


def documents_that_fit(
    engine: Window, build: Callable[[Sequence[Doc]], Messages], docs: Sequence[Doc], max_tokens: int
) -> list[Doc]:
    """Return the longest prefix of `docs` whose prompt leaves max_tokens in the window; whole documents are dropped from the end.

    Raises UserError if the question alone does not fit.
    """
    if engine.fits(build(docs), max_tokens):
        return list(docs)
    fitting, too_many = 0, len(docs)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if engine.fits(build(docs[:middle]), max_tokens):
            fitting = middle
        else:
            too_many = middle
    if fitting == 0 and not engine.fits(build([]), max_tokens):
        [question] = [message["content"] for message in build([]) if message["role"] == "user"]
        raise UserError(f"--max-model-len: the question alone is longer, {question[:80]!r}...; shorten the question or raise the limit")
    return list(docs[:fitting])


def positions_of(docs: Sequence[Doc], chosen: Sequence[Doc]) -> list[int]:
    """Return the 1-based positions of `chosen` in `docs`, by id. If an id occurs twice, the first position counts."""
    positions = {doc["id"]: position for position, doc in reversed(list(enumerate(docs, start=1)))}
    return [positions[doc["id"]] for doc in chosen]


def load_builders(engine: EngineOptions, calls: CallOptions, both: bool = True, load: Callable[[EngineOptions], Any] | None = None) -> "Builders":
    """Load the selector and the generator, by `load` (default: load_engine).

    They are one model unless calls.reranker_model is given; `both=False` skips the selector. Two models in this process
    share the GPU memory that one model would get. Each is asked with the prompts of calls.prompts, or else with those
    that come with it, or else with the project's.
    """
    if not (both and calls.reranker_model):
        builder = _load_builder(engine, calls, load or load_engine)
        return builder, builder
    answering = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / 2)
    choosing = replace(answering, llm_model=calls.reranker_model, template=calls.reranker_template or engine.template)
    generator = _load_builder(answering, calls, load or load_engine)
    return _load_builder(choosing, calls, load or load_engine), generator


def _load_builder(engine: EngineOptions, calls: CallOptions, load: Callable[[EngineOptions], Any]) -> "RequestBuilder":
    if not engine.api_base:  # a server's model is only a name
        engine = replace(engine, llm_model=pull(resolve_model(engine.llm_model)))
    return RequestBuilder(load(engine), replace(calls, prompts=prompts_for(engine.llm_model, calls.prompts)))


def work_on_fitting(
    rows: list[Row], builders: "Builders", work: Callable[[list[Row]], list[Row]], fail: Callable[[Row, str], Row]
) -> list[Row]:
    """Return work() of the rows whose question fits the window, and fail(row, reason) of the others, in order.

    A question that is too long therefore does not end the run.
    """
    models = list(dict.fromkeys(builders))
    reasons_in_order = in_threads(lambda row: next(filter(None, (builder.too_long(row) for builder in models)), None), rows)
    reasons = list(zip(rows, reasons_in_order, strict=True))
    done = iter(work([row for row, reason in reasons if not reason]))
    return [fail(row, reason) if reason else next(done) for row, reason in reasons]


@contextmanager
def asking(builders: "Builders", output: str, overwrite: bool) -> Iterator[None]:
    """Context of a run that writes `output`: caches the replies of a server, and logs at the end how many texts were cut off."""
    models, cache = list(dict.fromkeys(builders)), CompletionCache(output)
    if overwrite:
        cache.remove()
    for builder in models:
        builder.begin(cache)
    try:
        yield
    finally:
        for builder in models:
            builder.say_cut_off()
    cache.remove()


def read_selection(completion: Completion, sample: int, n_docs: int, notation: Notation) -> Selection:
    """Parse the selection from a sample of a completion."""
    if reason := completion.reason("selection", sample):
        return Selection([], False, reason=reason)
    return parse_ids(completion.texts[sample], n_docs, sample in completion.cut_off, notation)


class RequestBuilder:
    """Builds the requests of one run from its options and sends them."""

    def __init__(self, engine: VllmEngine | ApiEngine, options: CallOptions):
        self._options = options
        self.engine, self.dataset = engine, options.dataset
        self.prompts = Prompts(options.prompts)
        self._said_cut = False
        self._texts, self._cut_off = Counter(), Counter()  # by (flag of the limit, limit)

    def begin(self, cache: CompletionCache) -> None:
        """Begin a run: reset the counts of texts that were cut off, and store a server's replies in `cache`."""
        self._texts.clear()
        self._cut_off.clear()
        if isinstance(self.engine, ApiEngine):
            self.engine.keep_in(cache)

    def ask(self, requests: list[Request]) -> list[Completion]:
        """Run all requests as one batch, in order."""
        completions = self.engine.complete(requests)
        for request, completion in zip(requests, completions, strict=True):
            self._texts[request.limit, request.max_tokens] += len(completion.texts)
            self._cut_off[request.limit, request.max_tokens] += len(completion.cut_off)
        return completions

    def say_cut_off(self) -> None:
        """Log one warning for each limit that cut off texts."""
        for (flag, limit), number in sorted(self._cut_off.items()):
            if number:
                what = "selections" if flag == "--selection-max-tokens" else "answers"
                log.warning("%s: the limit of %d tokens cut off %d of the %d %s to which it applied; raise the limit",
                            flag, limit, number, self._texts[flag, limit], what)

    def _fit(self, build: Callable[[Sequence[Doc]], Messages], docs: Sequence[Doc], max_tokens: int) -> list[Doc]:
        fitting = documents_that_fit(self.engine, build, docs, max_tokens)
        if len(fitting) < len(docs) and not self._said_cut:
            log.warning(
                "--max-model-len: only %d of %d documents of a question fit in the window, and the others are left out; this is "
                "logged once, and docs_shown of each row gives the number that the reranker saw", len(fitting), len(docs),
            )
            self._said_cut = True
        return fitting

    def too_long(self, row: Row) -> str | None:
        """Return why a row cannot be answered, if its question alone exceeds the window; otherwise None."""
        task = task_of_row(row)
        prompts = [
            (self.prompts.reranker(row["question"], []), self._options.selection_max_tokens),
            (self.prompts.generator(row["question"], [], self.prompts.instruction(row)), self._options.answer_max_tokens or task.max_tokens),
        ]
        if all(self.engine.fits(messages, max_tokens) for messages, max_tokens in prompts):
            return None
        window = getattr(self.engine, "max_model_len", None)
        return f"the question alone is longer than --max-model-len {window}: {row['question'][:80]!r}"

    def shown(self, question: str, docs: Sequence[Doc]) -> list[Doc]:
        """Return the documents that fit into the reranker's prompt."""
        return self._fit(lambda some: self.prompts.reranker(question, some), docs, self._options.selection_max_tokens)

    def select(
        self, row: Row, docs: Sequence[Doc], purpose: object = "select", n: int = 1, temperature: float | None = None, top_p: float = 1.0
    ) -> Request:
        """Return the request to select among `docs`, with `n` samples.

        The default temperature is --selection-temperature. `purpose` gives different seeds to different requests of one
        row.
        """
        return Request(
            messages=self.prompts.reranker(row["question"], docs),
            seed=derive_seed(self._options.seed, row["id"], purpose),
            max_tokens=self._options.selection_max_tokens,
            n=n, temperature=self._options.selection_temperature if temperature is None else temperature, top_p=top_p,
            pattern=ids_pattern(len(docs), self.prompts.notation) if self._options.constrain_ids == "on" else None,
            stop=self.prompts.stop("reranker"), limit="--selection-max-tokens",
        )

    def answer(self, row: Row, docs: Sequence[Doc]) -> Request:
        """Return the request to answer from `docs`, with greedy decoding. They are shown in their order, or in that of retrieval."""
        task = task_of_row(row)
        max_tokens = self._options.answer_max_tokens or task.max_tokens

        numbers = positions_of(row["docs"], docs)
        if self._options.answer_order == "retrieval":
            docs, numbers = [doc for _, doc in sorted(zip(numbers, docs, strict=True), key=lambda pair: pair[0])], sorted(numbers)

        def build(some: Sequence[Doc]) -> Messages:
            return self.prompts.generator(row["question"], some, self.prompts.instruction(row), numbers[: len(some)])

        return Request(
            messages=build(self._fit(build, docs, max_tokens)),
            seed=derive_seed(self._options.seed, row["id"], "answer", *(doc["id"] for doc in docs)),
            max_tokens=max_tokens, stop=self.prompts.stop("generator"),
        )

    def judge_document(self, row: Row, doc: Doc) -> Request:
        """Return the request that asks whether one document is needed, Yes or No (the pointwise baseline)."""
        return Request(
            messages=self.prompts.pointwise(row["question"], doc),
            seed=derive_seed(self._options.seed, row["id"], "pointwise", doc["id"]),
            max_tokens=self._options.selection_max_tokens,
            pattern="(Yes|No)" if self._options.constrain_ids == "on" else None,
            stop=self.prompts.stop("pointwise"), limit="--selection-max-tokens",
        )


Builders = tuple[RequestBuilder, RequestBuilder]  # of the selector and of the generator
