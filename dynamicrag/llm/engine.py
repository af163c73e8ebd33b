"""The LLM: vLLM in this process, on GPUs or the CPU, or any OpenAI-compatible server.

Requests are sent as one large batch. Each has its own seed (see stage.derive_seed), so that a sample does not depend on
its position in the batch. On a GPU, the last digits of sums depend on the batch, and a few answers may change with
them, unless VLLM_BATCH_INVARIANT=1.
"""

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import orjson

from dynamicrag.llm.completion import (
    OPENS,
    Completion,
    Request,
    Sample,
    completion_of,
    leaves_open,
    refused,
)
from dynamicrag.llm.model_files import manifest_of
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.prompts import prefix_of
from dynamicrag.llm.server import ApiEngine
from dynamicrag.llm.templates import (
    AUTO,
    PromptTokenizer,
    forgeable,
    in_threads,
    load_prompts,
)
from dynamicrag.llm.vllm_environment import bars_are_off, prepare_vllm
from dynamicrag.models.chat_templates import Messages
from dynamicrag.models.checkpoints import model_window
from dynamicrag.stage import UserError, log

DEFAULT_WINDOW = 8192  # tokens; a larger window uses memory that no prompt here needs


def add_engine_flags(parser: ArgumentParser) -> None:
    """Add the flags of every stage that calls an LLM."""
    group = parser.add_argument_group("engine")
    group.add_argument("--llm-model", default="DynamicRAG_llama3_8b", help="checkpoint folder, training output or hub name; "
                       "prompts and template that come with a published model are used")
    group.add_argument("--template", default=AUTO,
                       help="chat template: a file of template/*.jinja, or auto for the checkpoint's own template, or "
                            "else the file that it was trained with")
    group.add_argument("--enable-thinking", nargs="?", const="on", choices=["on", "off"],
                       help="let the model reason first, if its chat template supports it (default: off; for a server, "
                       "the server's default)")
    group.add_argument("--api-base", metavar="URL",
                       help="use an OpenAI-compatible server, which applies its own template. Azure: "
                       "https://NAME.openai.azure.com/openai/deployments/DEPLOYMENT?api-version=VERSION")
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="number of GPUs per model")
    group.add_argument("--max-model-len", type=int,
                       help=f"window in tokens for prompt and answer (default: {DEFAULT_WINDOW}, or the model's "
                            "window if it is smaller)")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9,
                       help="share of the GPU memory that vLLM may use")
    group.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                       help="type of the weights")


def resolve_model(name: str) -> str:
    """Return the checkpoint that a model name stands for.

    A folder with a config.json is returned unchanged. The output folder of the recipes (`NAME`, with `NAME/sft` and
    `NAME/dpo`) stands for DPO if it has finished, otherwise for SFT. Any other name is taken as a hub name.
    """
    folder = Path(name)
    for stage_folder in (folder, folder / "dpo", folder / "sft"):
        if (config := stage_folder / "config.json").is_file():
            try:
                orjson.loads(config.read_bytes())
            except orjson.JSONDecodeError as error:
                raise UserError(f"{config}: not valid JSON ({error}); train the model again, or give another --llm-model") from error
            return str(stage_folder)
    if folder.is_dir() or name.startswith("DynamicRAG_") or name.startswith(("/", ".")):
        raise UserError(
            f"{name}: contains no model (there is no config.json in it, in its sft/ or in its dpo/); "
            "train it with llamafactory-cli train recipes/<model>/sft.yaml, or give --llm-model a checkpoint folder"
        )
    return name


def engine_inputs(engine: EngineOptions, calls: CallOptions) -> list[str]:
    """Return the files and folders that affect the output of an LLM stage, besides its rows: template, prompts, checkpoints.

    The manifest of a model that is published on the hub stands for all its files.
    """
    models = [] if engine.api_base else [engine.llm_model, calls.reranker_model]
    checkpoints = [resolve_model(model) for model in models if model]
    files = [name for name in (engine.template, calls.reranker_template, calls.prompts) if name and name != AUTO]
    manifests = [str(path) for name in checkpoints if not Path(name).exists() and (path := manifest_of(name))]
    return [*files, *(name for name in checkpoints if Path(name).is_dir()), *manifests]


def load_engine(options: EngineOptions) -> "VllmEngine | ApiEngine":
    """Return the engine that the options describe."""
    if options.api_base:
        if options.max_model_len:
            log.warning("--max-model-len: has no effect with --api-base; the server has its own window, and a question that "
                        "exceeds it gets no answer")
        return ApiEngine(options.api_base, options.llm_model, options.enable_thinking)
    return VllmEngine(options)


def window_of(model: str, asked: int | None) -> int:
    """Return --max-model-len, by default the smaller of DEFAULT_WINDOW and the model's window.

    Raises UserError if it is larger than that.
    """
    own = model_window(model)
    if asked and own and asked > own and not os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        raise UserError(f"--max-model-len {asked}: the window of {model} is {own} tokens; give --max-model-len {own}, "
                        "or omit the flag")
    if not asked and own and own < DEFAULT_WINDOW:
        log.info("--max-model-len: %d, the window of %s", own, model)
    return asked or min(own or DEFAULT_WINDOW, DEFAULT_WINDOW)


class VllmEngine:
    """vLLM in this process. Prompts are rendered with the chat template chosen here and passed as token ids."""

    def __init__(self, options: EngineOptions):
        """Raises UserError if the template does not belong to the model, and for every error that vLLM raises at the start."""
        # Checks that do not need the weights come first.
        model = resolve_model(options.llm_model)
        self._prompts: PromptTokenizer = load_prompts(model, options.template, options.enable_thinking == "on")
        self.max_model_len = window_of(model, options.max_model_len)
        on_cpu = prepare_vllm(options.tensor_parallel_size)
        # On a CPU, vLLM cannot prefill a seeded request in pieces ("CPU Generator does not use offset"). By default it
        # shares prompts in blocks of 128 tokens, and each of several samples would compute the rest of the prompt
        # again.
        on_a_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": self.max_model_len, "block_size": 32} if on_cpu else {}
        log.info("loading %s into vLLM (%s)", model, "CPU" if on_cpu else f"{options.tensor_parallel_size} GPU")
        try:
            self._llm = self._start(
                model=model,
                tensor_parallel_size=options.tensor_parallel_size,
                max_model_len=self.max_model_len,
                gpu_memory_utilization=options.gpu_memory_utilization,
                dtype="bfloat16" if on_cpu and options.dtype == "auto" else options.dtype,
                enable_prefix_caching=True,
                enforce_eager=on_cpu,  # compilation takes a minute on a CPU and saves less than 8 %
                generation_config="vllm",  # sampling parameters come from the requests, not from the checkpoint
                **on_a_cpu,
            )
        except Exception as error:  # vLLM raises the exceptions of all its libraries
            raise UserError(f"{model}: vLLM cannot load it: {_refusal(error)}; see --max-model-len, --dtype, --gpu-memory-utilization "
                            "and --tensor-parallel-size, or give another --llm-model") from error
        # Warn about what the template makes possible
        tokenizer = self._prompts.tokenizer
        if tokens := forgeable(self._prompts.chat_template, tokenizer):
            log.warning("%s: a document may contain %s and forge a turn with it; add it to TURN_MARKERS in "
                        "dynamicrag/llm/prompts.py before you train", self._prompts.name, ", ".join(tokens))
        if self._prompts.opens_reasoning:
            log.warning("%s: starts the model's reasoning; constrained selections (--constrain-ids on) have no reasoning, and "
                        "token limits include the reasoning", self._prompts.name)
        # If reasoning tags are special tokens, removing special tokens would leave the reasoning in the text.
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(token for token in special if not OPENS.fullmatch(token) and not OPENS.fullmatch(token.replace("/", "")))
        self._tags_are_special = len(self._special) < len(special)

    def _start(self, **arguments: Any) -> Any:
        """Return vLLM with these arguments."""
        from vllm import LLM

        return LLM(**arguments)

    def place(self) -> dict[str, str]:
        """Return the name of the device and the dtype of the computation, to which `--dtype auto` was resolved."""
        from vllm.platforms import current_platform

        return {"device": current_platform.get_device_name(), "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")}

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return whether the prompt leaves room for max_tokens in the window. A text of megabytes is not tokenised to find out."""
        characters = sum(len(message["content"]) for message in messages)
        return characters <= self.max_model_len * self._prompts.longest_token and len(self._prompts.ids(messages)) + max_tokens <= self.max_model_len

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run all requests as one batch.

        Results are in order; a prompt that exceeds the window gives a completion without text.
        """
        if not requests:
            return []
        ids_of_requests = in_threads(lambda request: self._prompts.ids(request.messages), requests)
        completions = {number: self._too_long(*pair) for number, pair in enumerate(zip(requests, ids_of_requests, strict=True))}
        numbers = [number for number, refusal in completions.items() if refusal is None]
        prompts = [{"prompt_token_ids": ids_of_requests[number]} for number in numbers]
        params = [self._sampling(requests[number]) for number in numbers]
        outputs = self._llm.generate(prompts, params, use_tqdm=not bars_are_off()) if numbers else []
        for number, output in zip(numbers, outputs, strict=True):
            completions[number] = self._completion(requests[number], output)
        return [completion for completion in completions.values() if completion is not None]

    def _too_long(self, request: Request, ids: list[int]) -> Completion | None:
        """Return the refusal of a prompt that exceeds the window, or None."""
        if len(ids) + request.max_tokens <= self.max_model_len:
            return None
        return refused(request, f"a prompt of {len(ids)} tokens does not leave {request.max_tokens} ({request.limit}) "
                                f"within --max-model-len {self.max_model_len}")

    def _sampling(self, request: Request, **more: Any) -> Any:
        """Return vLLM's SamplingParams of a request."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        # Otherwise the constraint would exclude the first token of every answer that the model was trained to write.
        space = " ?" if request.pattern and self._prompts.opens_with_space else ""
        return SamplingParams(
            n=request.n, temperature=request.temperature, top_p=request.top_p,
            max_tokens=request.max_tokens, seed=request.seed, skip_special_tokens=not self._tags_are_special,
            structured_outputs=StructuredOutputsParams(regex=f"{space}({request.pattern})" if space else request.pattern) if request.pattern else None,
            stop=list(request.stop), stop_token_ids=self._stop_tokens(request.stop), **more,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        """Return the completion of a request from vLLM's finished output."""
        return completion_of(
            [Sample(self._readable(sample.text), sample.finish_reason) for sample in output.outputs], request,
            prompt_tokens=len(output.prompt_token_ids or ()),
            generated_tokens=sum(len(sample.token_ids) for sample in output.outputs),
            opened=self._opened(request),
        )

    def _opened(self, request: Request) -> bool:
        """Return whether the prompt of a request ends within reasoning."""
        return leaves_open(prefix_of(request.messages), self._prompts.opens_reasoning)

    def _stop_tokens(self, stop: tuple[str, ...]) -> list[int]:
        """Return the ids of the special tokens in `stop`.

        Matching their text would fail, because the output omits them.
        """
        return [self._prompts.tokenizer.convert_tokens_to_ids(text) for text in stop if text in self._special]

    def _readable(self, text: str) -> str:
        """Return the text without special tokens, except reasoning tags."""
        for token in self._special if self._tags_are_special else ():
            text = text.replace(token, "")
        return text


def _refusal(error: Exception) -> str:
    """Return the reason of a vLLM error in one line. Pydantic errors have a heading and an ending without information."""
    if (details := getattr(error, "errors", None)) and (errors := details()):
        return str(errors[0].get("msg", error)).removeprefix("Value error, ")
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
