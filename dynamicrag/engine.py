"""The LLM: vLLM in this process, on GPUs and on the CPU alike, or any OpenAI-compatible server.

Requests go in as one large batch. Each carries its own seed (see stage.derive_seed), so that what comes back depends
on the request and not on what it was batched with.
"""

import asyncio
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from dynamicrag.device import warn_of_unused_gpus
from dynamicrag.endpoint import check_url, read_key, without_key
from dynamicrag.prompts import Messages
from dynamicrag.stage import UserError, log
from dynamicrag.templates import PromptTokenizer, forgeable, in_threads, read_template

# vLLM starts its engine as a child process, by fork unless told otherwise, and CUDA cannot start in a forked child if the
# parent has asked for a GPU before (torch.cuda.is_available() is enough). So that question goes to NVML, and the child is spawned.
VLLM_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",  # on a CPU it warns of every weight it converts
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
API_CONCURRENCY = 64
API_RETRIES = 5


@dataclass(frozen=True)
class Request:
    """One prompt. `pattern` is a regular expression the output must match; None leaves it free."""

    messages: Messages
    seed: int
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    pattern: str | None = None


@dataclass
class Usage:
    """What a row has cost so far."""

    calls: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def add(self, completion: "Completion") -> None:
        self.calls += 1
        self.prompt_tokens += completion.prompt_tokens
        self.generated_tokens += completion.generated_tokens


@dataclass(frozen=True)
class Completion:
    """What came back for one request: `n` texts (stripped), and the tokens they cost."""

    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0


def add_engine_flags(parser: ArgumentParser) -> None:
    """The flags of every stage that calls an LLM."""
    group = parser.add_argument_group("engine")
    group.add_argument("--llm-model", default="DynamicRAG_llama3_8b", help="checkpoint folder, training output or hub name")
    group.add_argument("--template", default="template/llama3.jinja", help="chat template, one of template/*.jinja")
    group.add_argument("--api-base", metavar="URL", help="use an OpenAI-compatible server instead; it applies its own template")
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs one model is spread over")
    group.add_argument("--max-model-len", type=int, default=8192, help="window in tokens, prompt and answer together")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU's memory vLLM may take")
    group.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="weights' type")


def resolve_model(name: str) -> str:
    """The checkpoint a model name stands for.

    A folder with a config.json is itself. The output folder of the recipes, `NAME/sft` and `NAME/dpo`, stands for its
    newest stage: DPO where that has finished, else SFT. Anything else is taken for a hub name.
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
            f"{name}: no model there (neither it nor its sft/ or dpo/ has a config.json); "
            "train it with llamafactory-cli train recipes/<model>/sft.yaml, or give --llm-model a checkpoint folder"
        )
    return name


def engine_inputs(args: Namespace) -> list[str]:
    """What decides the output of an LLM stage besides its rows: template, prompts and checkpoint folders."""
    models = [] if args.api_base else [args.llm_model, args.reranker_model]
    checkpoints = [resolve_model(model) for model in models if model]
    files = filter(None, [args.template, args.reranker_template, args.prompts])
    return [*files, *(name for name in checkpoints if Path(name).is_dir())]


def load_engine(args: Namespace) -> "VllmEngine | ApiEngine":
    """The engine the flags of add_engine_flags ask for."""
    if args.api_base:
        return ApiEngine(args.api_base, args.llm_model)
    return VllmEngine(resolve_model(args.llm_model), args)


def bind_cores(cores: set[int], ranks: int) -> str:
    """The cores of each rank, as vLLM's CPU build reads them: `0|1`. All are in use; by default vLLM leaves one idle per rank.

    Ranks share all cores if there are more ranks than cores.
    """
    ordered = sorted(cores)
    parts = [ordered[rank * len(ordered) // ranks : (rank + 1) * len(ordered) // ranks] for rank in range(ranks)]
    return "|".join(",".join(map(str, part if all(parts) else ordered)) for part in parts)


def prepare_vllm(ranks: int = 1) -> bool:
    """Set the environment that `ranks` processes of vLLM need and import it; True if it runs on the CPU.

    vLLM itself says which platform it has: the CPU build may stand beside a GPU. Raises UserError if it has none.
    """
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise UserError("vLLM: this build is for GPUs and sees none here; check nvidia-smi and CUDA_VISIBLE_DEVICES, install "
                        "the CPU build with bash scripts/setup.sh cpu, or give --api-base the address of a server")
    if not current_platform.is_cpu():
        return False
    warn_of_unused_gpus("vLLM's CPU build")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind_cores(os.sched_getaffinity(0), ranks))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return True


class VllmEngine:
    """vLLM in process. Prompts are rendered with our own template and handed over as token ids."""

    def __init__(self, model: str, args: Namespace):
        chat_template = read_template(args.template)
        self.max_model_len = args.max_model_len
        on_cpu = prepare_vllm(args.tensor_parallel_size)
        from vllm import LLM

        # On a CPU vLLM cannot prefill a seeded request piecemeal ("CPU Generator does not use offset"), and by default shares
        # prompts in blocks of 128 tokens: each of several samples would read what is left over of its prompt again.
        on_a_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": args.max_model_len, "block_size": 32} if on_cpu else {}
        log.info("loading %s into vLLM (%s)", model, "CPU" if on_cpu else f"{args.tensor_parallel_size} GPU")
        self._llm = LLM(
            model=model,
            tensor_parallel_size=args.tensor_parallel_size,
            max_model_len=args.max_model_len,
            gpu_memory_utilization=args.gpu_memory_utilization,
            dtype="bfloat16" if on_cpu and args.dtype == "auto" else args.dtype,
            enable_prefix_caching=True,
            enforce_eager=on_cpu,  # compilation takes a minute on a CPU and gains under 8 %
            generation_config="vllm",  # sampling parameters come from the requests alone, not from the checkpoint
            **on_a_cpu,
        )
        self._prompts = PromptTokenizer(self._llm.get_tokenizer(), chat_template)
        if tokens := forgeable(chat_template, self._prompts.tokenizer):
            log.warning("%s: a document may hold %s, and forge a turn with it; add it to TURN_MARKERS in dynamicrag/prompts.py "
                        "before you train", args.template, ", ".join(tokens))

    def place(self) -> dict[str, str]:
        """The name of the device, and the type in which it computes: what `--dtype auto` came to."""
        from vllm.platforms import current_platform

        return {"device": current_platform.get_device_name(), "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")}

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Whether the prompt leaves room for an answer of max_tokens in the window."""
        return len(self._prompts.ids(messages)) + max_tokens <= self.max_model_len

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run all requests as one batch, in order. Raises UserError for a prompt longer than the window."""
        if not requests:
            return []
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompts, params = [], []
        ids_of_requests = in_threads(lambda request: self._prompts.ids(request.messages), requests)
        for request, ids in zip(requests, ids_of_requests, strict=True):
            if len(ids) + request.max_tokens > self.max_model_len:
                raise UserError(
                    f"a prompt of {len(ids)} tokens does not leave {request.max_tokens} for the answer within "
                    f"--max-model-len {self.max_model_len}; its question begins {request.messages[-1]['content'][:80]!r}"
                )
            prompts.append({"prompt_token_ids": ids})
            params.append(SamplingParams(
                n=request.n, temperature=request.temperature, top_p=request.top_p,
                max_tokens=request.max_tokens, seed=request.seed,
                structured_outputs=StructuredOutputsParams(regex=request.pattern) if request.pattern else None,
            ))
        outputs = self._llm.generate(prompts, params, use_tqdm=True)
        return [
            Completion(
                texts=[sample.text.strip() for sample in output.outputs],
                prompt_tokens=len(output.prompt_token_ids),
                generated_tokens=sum(len(sample.token_ids) for sample in output.outputs),
            )
            for output in outputs
        ]


class ApiEngine:
    """Any OpenAI-compatible server, called concurrently. The key comes from OPENAI_API_KEY alone."""

    def __init__(self, base_url: str, model: str):
        """Raises UserError for a base URL with more than host and path, and for a key no header can hold."""
        self._base_url = check_url("--api-base", base_url, "OPENAI_API_KEY")
        self._key = read_key("OPENAI_API_KEY")
        self._model = model

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """The server's window is not known here: whatever it refuses ends the run with its own message."""
        return True

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run all requests, at most API_CONCURRENCY at a time, in order. Raises UserError where the server refuses."""
        return asyncio.run(self._complete_all(requests))

    async def _complete_all(self, requests: list[Request]) -> list[Completion]:
        import openai
        from tqdm.asyncio import tqdm

        slots = asyncio.Semaphore(API_CONCURRENCY)
        async with openai.AsyncOpenAI(base_url=self._base_url, api_key=self._key or "none", max_retries=API_RETRIES) as client:

            async def complete(request: Request) -> Completion:
                try:
                    async with slots:
                        reply = await client.chat.completions.create(
                            model=self._model, messages=request.messages, n=request.n, seed=request.seed,
                            max_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p,
                            extra_body={"structured_outputs": {"regex": request.pattern}} if request.pattern else None,
                        )
                    texts = [(choice.message.content or "").strip() for choice in reply.choices]
                    texts = [text.encode(errors="replace").decode() for text in texts]  # half a surrogate pair, which JSON allows, is no text
                    used = (reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else (0, 0)
                    if not all(type(count) is int for count in used):
                        raise TypeError(f"usage is {used}")
                except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:  # what parsing JSON and reading it raise
                    raise UserError(without_key(f"{self._base_url}: its reply is no chat completion ({error})", self._key)) from error
                if len(texts) < request.n:
                    raise UserError(f"{self._base_url}: returned {len(texts)} of n={request.n} samples; it does not support n")
                return Completion(texts, *used)

            try:
                return await tqdm.gather(*map(complete, requests), unit="request")
            except openai.OpenAIError as error:
                raise UserError(without_key(f"{self._base_url}: {error}", self._key)) from error
