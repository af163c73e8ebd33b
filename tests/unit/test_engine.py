"""The edges of the engine: the checkpoint of a name, templates, OpenAI-compatible servers, and the start of vLLM with stand-ins. test_chain.py runs vLLM itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import at, names
from stages import REPO
from stubs import StubServer, chat_completion, make_tiny_llama

from dynamicrag.llm.engine import ApiEngine, Request, VllmEngine, resolve_model, window_of
from dynamicrag.llm.templates import PromptTokenizer, in_threads
from dynamicrag.models.chat_templates import read_template
from dynamicrag.stage import UserError


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_a_training_folder_stands_for_its_newest_stage(tmp_path):
    model = tmp_path / "DynamicRAG_tiny"
    checkpoint(model / "sft")
    assert resolve_model(str(model)) == str(model / "sft")
    (model / "dpo").mkdir()  # DPO has begun
    assert resolve_model(str(model)) == str(model / "sft")
    (model / "dpo/config.json").write_text("{}")
    assert resolve_model(str(model)) == str(model / "dpo")
    assert resolve_model(str(model / "sft")) == str(model / "sft")


@pytest.mark.parametrize("name", ["DynamicRAG_never_trained", "/no/such/folder", "./none"])
def test_a_model_that_is_not_there_is_named_with_what_makes_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=at(name, "llamafactory-cli train")):
        resolve_model(name)


def test_anything_else_is_a_hub_name():
    assert resolve_model("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"


def test_a_broken_template_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{{ bos_token }}\n{% for %}")
    with pytest.raises(UserError, match=at("broken.jinja:2")):
        read_template(str(path))
    with pytest.raises(UserError, match=at("absent.jinja")):
        read_template(str(tmp_path / "absent.jinja"))


@pytest.fixture
def server():
    """A server that answers every prompt with its seed, once per sample, or once if its `ignores_n` is set. It keeps the requests in `received`."""

    def answer(_, body):
        server.received.append(body)
        samples = 1 if server.ignores_n else body.get("n", 1)
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return 200, chat_completion(*[f" {body['seed']} "] * samples, model=body["model"], usage=usage)

    server = StubServer(answer)
    server.received, server.ignores_n = [], False
    yield server
    server.close()


def ask(seed: int, **more) -> Request:
    return Request([{"role": "user", "content": "hello"}], seed=seed, max_tokens=5, **more)


def test_a_server_gets_every_setting_and_answers_come_back_in_order(server):
    completions = ApiEngine(server.url, "some-model").complete([ask(seed, n=2, pattern="None") for seed in range(20)])
    assert [completion.texts for completion in completions] == [[str(seed)] * 2 for seed in range(20)]
    assert completions[0].prompt_tokens == 7 and completions[0].generated_tokens == 3
    assert {body["model"] for body in server.received} == {"some-model"}
    assert server.received[0]["max_tokens"] == 5 and server.received[0]["structured_outputs"] == {"regex": "None"}


def test_a_server_that_ignores_n_is_asked_once_a_sample(server):
    server.ignores_n = True
    [completion] = ApiEngine(server.url, "some-model").complete([ask(1, n=4)])
    assert completion.texts == ["1", "2", "3", "4"] and completion.prompt_tokens == 4 * 7
    assert len(server.received) == 5, "the request for all, and one for each sample, as nothing keeps the first"


def test_a_server_that_is_not_there_ends_the_run_with_its_address(monkeypatch):
    monkeypatch.setattr("dynamicrag.llm.endpoint.ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        ApiEngine("http://127.0.0.1:9/v1", "some-model").complete([ask(1)])


# ---------------------------------------------------------------- vLLM and its child process

# Stand-ins for torch and vLLM with the same rules. If a process has asked for a GPU, but not through NVML, CUDA is broken in its
# forked children. After an import of vLLM the question does no harm. The engine is a child process, and is forked by default.
STAND_INS = {
    "torch/__init__.py": "from torch import cuda\n",
    "torch/cuda.py": (
        "import os\npoisoned = False\n"
        "def is_available():\n    global poisoned\n    poisoned |= os.environ.get('PYTORCH_NVML_BASED_CUDA_CHECK') != '1'\n    return True\n"
    ),
    "vllm/__init__.py": (
        "import multiprocessing, os\nimport torch\nos.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'\n"
        "def start():\n    raise SystemExit(torch.cuda.poisoned)\n"
        "class LLM:\n"
        "    def __init__(self, **options):\n"
        "        method = multiprocessing.get_context(os.environ.get('VLLM_WORKER_MULTIPROC_METHOD', 'fork'))\n"
        "        engine = method.Process(target=start)\n        engine.start()\n        engine.join()\n"
        "        assert engine.exitcode == 0, 'Cannot re-initialize CUDA in forked subprocess'\n"
        "        print(options['enforce_eager'])\n"
        "    def get_tokenizer(self):\n        return None\n"
    ),
    "vllm/platforms.py": "class current_platform:\n    device_type = 'cuda'\n    is_cpu = staticmethod(lambda: False)\n",
}
START = """
import sys
from types import SimpleNamespace
from dynamicrag.llm import engine
if __name__ == "__main__":
    tokenizer = SimpleNamespace(added_tokens_decoder={})
    engine.load_prompts = lambda *of: SimpleNamespace(tokenizer=tokenizer, chat_template="", opens_reasoning=False)
    engine.model_window, engine.forgeable = lambda model: None, lambda *of: []
    if "cuda" in sys.argv:
        import torch
        torch.cuda.is_available()
    engine.VllmEngine(engine.EngineOptions("model", template="", max_model_len=8))
"""


def start_engine(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    for name, text in {**STAND_INS, "start.py": START}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTORCH_"))}
    return subprocess.run([sys.executable, folder / "start.py", *words], cwd=REPO, capture_output=True, text=True,
                          env={**clean, "PYTHONPATH": f"{folder}:{REPO}", **environment})


@pytest.mark.parametrize("words", [(), ("cuda",)])
def test_on_a_gpu_the_engine_starts_as_a_child_process(tmp_path, words):
    """This holds even if the process has already asked torch for a GPU."""
    started = start_engine(tmp_path, *words)
    assert started.returncode == 0, started.stderr
    assert started.stdout.strip() == "False"


def test_the_stand_ins_poison_a_forked_engine_as_cuda_does(tmp_path):
    broken = start_engine(tmp_path, "cuda", VLLM_WORKER_MULTIPROC_METHOD="fork")
    assert broken.returncode == 1 and "re-initialize CUDA" in broken.stderr


def test_a_gpu_build_of_vllm_without_a_gpu_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(STAND_INS, "vllm/platforms.py", "class current_platform:\n    device_type = ''\n")
    refused = start_engine(tmp_path)
    assert refused.returncode == 1 and "UserError" in refused.stderr.splitlines()[-1]


# ---------------------------------------------------------------- prompts as tokens


class CountingTokenizer:
    """A tokenizer whose tokens are words. It keeps the texts that it has encoded."""

    def __init__(self):
        self.encoded = []

    def apply_chat_template(self, messages, **options):
        return messages[-1]["content"]

    def encode(self, text, **options):
        self.encoded.append(text)
        return [len(word) for word in text.split()]


def test_a_prompt_is_tokenised_once_however_often_it_is_measured_and_sent():
    tokenizer = CountingTokenizer()
    prompts = PromptTokenizer(tokenizer, "")
    texts = [f"prompt {number}" for number in range(50)]
    for _ in range(3):
        assert in_threads(lambda text: prompts.ids([{"role": "user", "content": text}]), texts) == [[6, len(text) - 7] for text in texts]
    assert sorted(tokenizer.encoded) == sorted(texts)


def test_only_the_latest_prompts_are_kept(monkeypatch):
    monkeypatch.setattr("dynamicrag.llm.templates.KEPT_TOKENS", 4)
    tokenizer = CountingTokenizer()
    prompts = PromptTokenizer(tokenizer, "")
    for text in ("a b", "c d", "e f", "e f", "a b", "longer than all that is kept"):
        assert prompts.ids([{"role": "user", "content": text}]) == [len(word) for word in text.split()]
    assert tokenizer.encoded == ["a b", "c d", "e f", "a b", "longer than all that is kept"]


# ---------------------------------------------------------------- the window, and what vLLM refuses


@pytest.mark.parametrize(("config", "asked", "window"), [
    ({"max_position_embeddings": 2048}, None, 2048), ({"max_position_embeddings": 131072}, None, 8192), ({}, None, 8192), ({"n_positions": 1024}, None, 1024),
    ({"text_config": {"max_position_embeddings": 4096}}, None, 4096), ({"max_position_embeddings": 4096}, 512, 512), ({"max_position_embeddings": 131072}, 32768, 32768),
    ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, None, 4096),
    ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, None, 4096),
])
def test_the_window_is_the_models_own_if_that_is_smaller(tmp_path, caplog, config, asked, window):
    caplog.set_level("INFO")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert window_of(str(tmp_path), asked) == window
    assert bool(caplog.messages) == (not asked and window < 8192), "a smaller one is said"


def test_a_window_larger_than_the_models_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    with pytest.raises(UserError, match=at("--max-model-len 4096", tmp_path, "--max-model-len 2048")):
        window_of(str(tmp_path), 4096)


def test_what_vllm_refuses_is_one_line(tmp_path, monkeypatch):
    broken = STAND_INS["vllm/__init__.py"].split("class LLM:")[0] + (
        "import pydantic\nclass Config(pydantic.BaseModel):\n    n: int\n    @pydantic.field_validator('n')\n"
        "    def small(cls, n):\n        raise ValueError('n=1, not 0')\n"
        "def LLM(**options):\n    Config(n=1)\n"
    )
    monkeypatch.setitem(STAND_INS, "vllm/__init__.py", broken)
    refused = start_engine(tmp_path)
    assert refused.returncode == 1 and names(refused.stderr.splitlines()[-1], "UserError: model", "n=1, not 0")


# ---------------------------------------------------------------- what the model in this process writes


class Output:
    """vLLM's output of one request."""

    def __init__(self, *samples: tuple[str, str]):
        self.prompt_token_ids = [1, 2, 3]
        self.outputs = [SimpleNamespace(text=text, finish_reason=finish, token_ids=[1, 2]) for text, finish in samples]


class Words:
    """A PromptTokenizer whose tokens are words."""

    def __init__(self, opens_reasoning: bool = False, opens_with_space: bool = False):
        self.opens_reasoning, self.opens_with_space = opens_reasoning, opens_with_space

    def ids(self, messages):
        return [len(word) for word in messages[-1]["content"].split()]


@pytest.fixture
def in_process(monkeypatch):
    """An engine whose vLLM returns `outputs`. Its requests are in `engine.sent`."""
    vllm, sampling_params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams, sampling_params.StructuredOutputsParams = SimpleNamespace, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)

    def make(*outputs: Output, opens_reasoning: bool = False, special: tuple[str, ...] = (), tags: bool = False) -> VllmEngine:
        engine = VllmEngine.__new__(VllmEngine)
        engine.sent = []

        def generate(prompts, params, use_tqdm):
            engine.sent.append((prompts, params, use_tqdm))
            return list(outputs)

        engine._llm, engine._prompts, engine.max_model_len = SimpleNamespace(generate=generate), Words(opens_reasoning), 12
        engine._special, engine._tags_are_special = list(special), tags
        return engine

    return make


def test_reasoning_and_limits_are_read_in_this_process_as_from_a_server(in_process):
    engine = in_process(Output(("<think>[1]</think> [3]", "stop"), ("<think>[1]", "length")), Output(("[2]", "length")))
    first, second = engine.complete([ask(1, n=2), ask(2)])
    assert first.texts == ["[3]", ""] and names(first.reason("answer", 1), "answer", 5) and first.cut_off == {1}
    assert second.texts == ["[2]"] and second.cut_off == {0} and (first.prompt_tokens, first.generated_tokens) == (3, 4)


def test_a_template_that_opens_the_reasoning_is_known(in_process):
    engine = in_process(Output(("[1] is", "length")), Output(("[1]</think>[3]", "stop")), Output(("[2]", "stop")), opens_reasoning=True)
    cut_off, closed, constrained = engine.complete([ask(1), ask(2), ask(3, pattern=r"\[2\]")])
    assert cut_off.reason("answer") and closed.texts == ["[3]"] and constrained.texts == ["[2]"]


@pytest.mark.parametrize("space", [False, True])
def test_a_constraint_allows_the_space_with_which_a_model_begins_its_answers(in_process, space):
    engine = in_process(Output((" [2]" if space else "[2]", "stop")), Output(("any", "stop")))
    engine._prompts = Words(opens_with_space=space)
    constrained, _ = engine.complete([ask(1, pattern=r"\[2\]|None"), ask(2)])
    [with_pattern, without] = engine.sent[0][1]
    assert constrained.texts == ["[2]"] and without.structured_outputs is None
    allowed = [text for text in ("[2]", "None", " [2]", " None", "  [2]") if re.fullmatch(with_pattern.structured_outputs.regex, text)]
    assert allowed == ["[2]", "None", " [2]", " None"][: 4 if space else 2]


def test_a_prompt_longer_than_the_window_costs_itself(in_process):
    engine = in_process(Output(("a", "stop")))
    long = Request([{"role": "user", "content": "word " * 8}], seed=1, max_tokens=5, n=2)
    refused, answered = engine.complete([long, ask(2)])
    assert not refused.answered and len(refused.texts) == 2 and "--max-model-len 12" in refused.reason("answer", 1)
    assert answered.texts == ["a"] and len(engine.sent[0][0]) == 1
    assert in_process().complete([long])[0].answered is False


def test_tags_that_are_special_tokens_are_seen(in_process):
    engine = in_process(Output(("[THINK]a[/THINK]b</s>", "stop")), special=("</s>",), tags=True)
    assert engine.complete([ask(1)])[0].texts == ["b"] and engine.sent[0][1][0].skip_special_tokens is False


@pytest.mark.parametrize(("value", "bar"), [("1", False), (None, True)])
def test_vllms_bar_is_off_if_bars_are(value, bar):
    """The test needs a new process, since tqdm reads the environment when it is imported."""
    script = f"from dynamicrag.llm.vllm_environment import bars_are_off\nassert bars_are_off() is {not bar}"
    environment = {key: text for key, text in os.environ.items() if key != "TQDM_DISABLE"} | ({"TQDM_DISABLE": value} if value else {})
    subprocess.run([sys.executable, "-c", script], cwd=REPO, env=environment, check=True)


def test_a_text_of_megabytes_does_not_fit_and_is_not_tokenised(tmp_path):
    from transformers import AutoTokenizer

    make_tiny_llama(tmp_path)
    engine = object.__new__(VllmEngine)
    engine._prompts, engine.max_model_len = PromptTokenizer(AutoTokenizer.from_pretrained(tmp_path), read_template(str(REPO / "template/llama3.jinja"))), 100
    longest = max(engine._prompts.tokenizer.get_vocab(), key=len)
    assert engine.fits([{"role": "user", "content": "river"}], 5) and not engine.fits([{"role": "user", "content": "river " * 100}], 5)
    engine._prompts.ids = lambda messages: pytest.fail("it is tokenised")
    assert not engine.fits([{"role": "user", "content": "x" * (100 * len(longest) + 1)}], 5)


@pytest.mark.slow
def test_the_engine_continues_a_prefix_and_ends_at_a_stop_string(tmp_path):
    """vLLM's text never has a special token, so the id of the token ends the output. A block of reasoning that the prefix opens counts as reasoning."""
    from transformers import AutoTokenizer
    from vllm.outputs import CompletionOutput

    make_tiny_llama(tmp_path)
    sent = []

    class Llm:
        def generate(self, prompts, params, use_tqdm):
            sent.extend(zip(prompts, params, strict=True))
            outputs = [[CompletionOutput(0, text, [1], None, None, "stop")] for text in ("gas.", "hm", "hm</think>oil")]
            return [SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=output) for prompt, output in zip(prompts, outputs, strict=True)]

    engine = object.__new__(VllmEngine)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    engine._prompts, engine._llm, engine.max_model_len = PromptTokenizer(tokenizer, read_template(str(REPO / "template/llama3.jinja"))), Llm(), 500
    engine._special, engine._tags_are_special = [str(token) for token in tokenizer.added_tokens_decoder.values()], False
    asked = [{"role": "user", "content": "Which?"}]
    begun = [{"role": "assistant", "content": text} for text in ("It is", "<think>\n", "<think>\n")]
    requests = [Request([*asked, beginning], 1, 9, stop=("\n", "<|eot_id|>")) for beginning in begun]
    completions = engine.complete(requests)
    prompt, params = sent[0]
    assert tokenizer.decode(prompt["prompt_token_ids"]) == engine._prompts.render(asked) + "It is"
    assert (params.stop, params.stop_token_ids) == (["\n", "<|eot_id|>"], [tokenizer.convert_tokens_to_ids("<|eot_id|>")])
    assert [(completion.texts[0], bool(completion.reason("answer"))) for completion in completions] == [("gas.", False), ("", True), ("oil", False)]
