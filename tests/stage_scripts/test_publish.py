"""Publishing a model and pulling it again, with the real client of the hub and a hub on this machine."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import at, logged, names, naming, write_jsonl
from local_hub import LocalHub
from stages import REPO
from stubs import StubEngine, make_tiny_llama, question

import inference
import publish
from dynamicrag.evaluation.answers import summarise
from dynamicrag.llm import requests
from dynamicrag.llm.engine import engine_inputs
from dynamicrag.llm.model_files import MANIFEST, PROMPTS, TEMPLATE, manifest_of, prompts_for, prompts_yaml
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.templates import load_prompts
from dynamicrag.models.chat_templates import SAMPLE
from dynamicrag.rows.manifest import fingerprint
from dynamicrag.stage import UserError

OTHER_PROMPTS = 'reranker: {system: "You choose with care."}\ngenerator: {separator: "\\n"}\ninstructions: {nq: "Answer {{briefly}}."}\n'
NOT_PUBLISHED = ("training_args.bin", "trainer_state.json", "trainer_log.jsonl", "settings.txt", "trained_on.sha256", ".env", "training_loss.png", "checkpoint-9/optimizer.pt",
                 "checkpoint-9/model.safetensors", "adapter/adapter_model.safetensors", "notes.md", "token", "sft.0.lock")
WRITTEN = {MANIFEST, PROMPTS, TEMPLATE, "README.md"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model as scripts/05_sft.sh leaves it, with all that lies beside a model."""
    folder = tmp_path_factory.mktemp("trained") / "DynamicRAG_tiny/sft"
    make_tiny_llama(folder)
    for name in NOT_PUBLISHED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hf_secret")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 12, "epoch": 3.0, "log_history": [{"loss": 2.5}, {"loss": 1.25}]}))
    (folder / "settings.txt").write_text("recipes/llama3_8b/sft.yaml learning_rate=0.5 model_name_or_path=meta-llama/Tiny dataset_dir=/home/someone\n")
    (folder / "trained_on.sha256").write_text(f"{'a' * 64}  recipes/llama3_8b/sft.yaml\n{'b' * 64}  /home/someone/training_data/generator_sft_training.json\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "name_or_path": "/home/someone/models", "chat_template": "{{ messages }}"}))
    (folder / TEMPLATE).write_text((REPO / "template/llama3.jinja").read_text())
    return folder


@pytest.fixture
def model(trained, tmp_path, monkeypatch) -> str:
    """A copy of it in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "DynamicRAG_tiny/sft")
    write_jsonl(Path("q.jsonl"), [question(n, dataset="nq") for n in (1, 2, 3)])
    Path("p.yaml").write_text(OTHER_PROMPTS)
    return "DynamicRAG_tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LocalHub() as hub:
        hub.connect(monkeypatch, tmp_path / "cache", hub.token)
        yield hub


@pytest.fixture
def stub(monkeypatch):
    """A stub in place of the engine. Returns what it was loaded with, and asked."""
    loaded = []

    def load_engine(args: EngineOptions) -> StubEngine:
        engine = StubEngine(lambda request, kind, titles: "[2]" if kind == "select" else f"from {' '.join(titles)}")
        engine.args = args
        loaded.append(engine)
        return engine

    monkeypatch.setattr(requests, "load_engine", load_engine)
    return loaded


def infer(model: str, output: str, *flags: str) -> bytes:
    inference.main(["--input-json", "q.jsonl", "--output-json", output, "--llm-model", model, *flags])
    return Path(output).read_bytes()


def asked(engine: StubEngine) -> list:
    return [request.messages for batch in engine.batches for request in batch]


def metrics_file(path: str, systems: dict[str, dict[str, list[str]]], **arguments: object) -> str:
    """Metrics of evaluate.py, of responses by data set and system, for questions whose answer is oil."""
    summaries = {}
    for name, responses in systems.items():
        rows = [{**question(n, dataset=dataset), "id": f"{dataset}{n}", "answers": ["oil"], "response": response, "id_list": [1]}
                for dataset, given in responses.items() for n, response in enumerate(given)]
        summaries[name], _ = summarise(rows, None, "dataset", 1)
    files = [f"{name}.json" for name in systems]
    Path(path).write_text(json.dumps({"arguments": {"results_file": files, "group_by": "dataset", **arguments}, "results": summaries}))
    return path


def answered_by(name: str, model: str, **arguments: object) -> None:
    """A results file with its manifest."""
    Path(f"{name}.json").write_text("[]")
    manifest = {"stage": "inference", "arguments": {"llm_model": model, "template": "auto", **arguments}, "inputs": {model: fingerprint(model)}}
    Path(f"{name}.json.manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------- both ways


def test_a_published_model_is_pulled_and_asked_in_the_same_words(model, hub, stub, caplog):
    caplog.set_level("INFO")
    publish.main([model, "--repo", "me/tiny", "--prompts", "p.yaml"])
    here = infer(f"{model}/sft", "here.json", "--prompts", "p.yaml")
    pulled = infer("me/tiny", "pulled.json")
    assert pulled == here and asked(stub[0]) == asked(stub[1])
    assert "You choose with care." in str(asked(stub[1])) and "Answer {briefly}." in str(asked(stub[1]))
    folder = Path(stub[1].args.llm_model)
    assert logged(caplog, folder / PROMPTS, level="INFO") == 1 and logged(caplog, "me/tiny", folder, level="INFO") == 1
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == hub.files("me/tiny")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == Path(f"{model}/sft/{name}").read_bytes()
    assert load_prompts(str(folder), "auto").ids(SAMPLE) == load_prompts(f"{model}/sft", str(REPO / "template/llama3.jinja")).ids(SAMPLE)
    assert logged(caplog, folder / TEMPLATE, level="INFO") == 1

    inputs = json.loads(Path("pulled.json.manifest.json").read_text())["inputs"]
    assert [name for name in inputs if name.endswith(MANIFEST)], "another commit is another input"
    hub.stop()
    assert infer(str(folder), "folder.json") == here, "a local folder that holds these files is the same"


def test_only_what_a_model_needs_leaves_this_machine(model, hub):
    publish.main([f"{model}/sft", "--repo", "me/tiny"])
    files = hub.files("me/tiny")
    assert files.keys() == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *WRITTEN}
    assert not [name for name, content in files.items() if b"hf_secret" in content or b"/home/someone" in content]
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    assert len(hub.repositories["model", "me/tiny"].commits) == 1, "nobody pulls half a model"


def test_the_manifest_has_the_hash_of_every_file_and_how_the_model_was_trained(model, hub):
    publish.main([model, "--repo", "me/tiny"])
    files = hub.files("me/tiny")
    manifest = json.loads(files.pop(MANIFEST))
    assert manifest["files"] == {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    [run] = manifest["training"]
    assert (manifest["base_model"], run["steps"], run["last_loss"]) == ("meta-llama/Tiny", 12, 1.25)
    assert run["settings"]["learning_rate"] == "0.5" and run["settings"]["cutoff_len"] == 8192
    assert run["data"] == {"generator_sft_training.json": "b" * 64}


def test_the_folder_of_a_trained_model_stays_as_it_is(model, hub):
    before = fingerprint(f"{model}/sft")
    publish.main([model, "--repo", "me/tiny"])
    assert fingerprint(f"{model}/sft") == before, "finished results would count as made from other inputs"


def test_a_model_that_is_published_again_loses_the_files_of_the_first_time(model, hub):
    folder = Path(model) / "sft"
    parts = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}))
    publish.main([model, "--repo", "me/tiny"])
    assert parts.keys() < hub.files("me/tiny").keys()
    hub.repositories["model", "me/tiny"].commit({**hub.files("me/tiny"), "demo.png": b"kept", "onnx/model.safetensors": b"kept"})
    for path in (index, *map(folder.joinpath, parts)):
        path.unlink()
    publish.main([model, "--repo", "me/tiny"])
    files = hub.files("me/tiny")
    assert not parts.keys() & files.keys() and index.name not in files and {"demo.png", "onnx/model.safetensors"} < files.keys()


def test_a_dry_run_writes_the_card_and_asks_the_hub_nothing(model, hub, capsys):
    publish.main([model, "--repo", "me/tiny", "--dry_run", "--output_dir", "look"])
    assert hub.requests == [] and {path.name for path in Path("look").iterdir()} == {*WRITTEN, "tokenizer_config.json"}
    told = {line.split()[1]: int(line.split()[3].replace(",", "")) for line in capsys.readouterr().out.splitlines()[2:]}
    assert told["model.safetensors"] == Path(model, "sft/model.safetensors").stat().st_size and told["README.md"] == Path("look/README.md").stat().st_size
    assert told.pop("total") == sum(told.values())
    publish.main([model, "--repo", "me/tiny", "--output_dir", "look"])
    assert hub.files("me/tiny")["README.md"] == Path("look/README.md").read_bytes()


@pytest.mark.slow
def test_the_engine_answers_with_a_pulled_model_as_with_the_one_that_was_published(model, hub, tmp_path):
    publish.main([model, "--repo", "me/tiny", "--prompts", "p.yaml"])
    flags = ["--input-json", "q.jsonl", "--answer-max-tokens", "8", "--max-model-len", "2048", "--selector", "dynamic", "all"]
    runs = [
        [*flags, "--llm-model", "me/tiny", "--output-json", "pulled_{selector}.json"],
        [*flags, "--llm-model", f"{model}/sft", "--output-json", "here_{selector}.json", "--prompts", "p.yaml", "--template", str(REPO / "template/llama3.jinja")],
    ]
    program = f"import inference\nfor flags in {runs!r}: inference.main(flags)"  # vLLM is imported once
    environment = {**hub.environment(tmp_path / "other", hub.token), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(REPO), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for selector in ("dynamic", "all"):
        assert Path(f"pulled_{selector}.json").read_bytes() == Path(f"here_{selector}.json").read_bytes()
    assert all(row["response"] for row in json.loads(Path("here_all.json").read_bytes()))


# ---------------------------------------------------------------- card and results


def test_the_card_has_parameters_data_limits_and_results_with_intervals(model, hub):
    from huggingface_hub import ModelCard

    answered_by("nq_dynamic", f"{model}/sft", selector="dynamic", topn=7)
    answered_by("nq_top3", f"{model}/sft", selector="top:3")
    results = metrics_file("m.json", {"nq_dynamic": {"nq": ["oil", "oil", "gas", "gas"], "demo": ["oil"]}, "nq_top3": {"nq": ["gas", "gas", "oil"]}})
    publish.main([model, "--repo", "me/tiny", "--results", results, "--license", "llama3", "--datasets", "some/data"])
    files = hub.files("me/tiny")
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"], data["language"]) == ("llama3", "meta-llama/Tiny", ["some/data"], ["en"])
    summary = json.loads(Path(results).read_text())["results"]["nq_dynamic"]
    [line] = [line for line in card.text.splitlines() if line.startswith("| nq_dynamic") and f"{summary['low']:.1f} to {summary['high']:.1f}" in line]
    assert names(line, 5, "60.0")
    assert [heading for heading in re.findall(r"^## (\w+)", card.text, re.MULTILINE)] == ["Use", "Training", "Results", "Limits", "Citation"]
    assert "--llm-model me/tiny" in card.text and "- learning_rate: 0.5" in card.text and f"`{'b' * 64}`" in card.text
    manifest = json.loads(files[MANIFEST])
    assert [result["arguments"].get("selector") for result in manifest["results"]] == ["dynamic", "top:3"] and manifest["results"][0]["score"] == 60.0


def test_results_are_in_the_form_of_the_hub(model, hub, caplog):
    from huggingface_hub import parse_eval_result_entries

    caplog.set_level("INFO")
    answered_by("dynamic", f"{model}/sft", selector="dynamic")
    answered_by("all", f"{model}/sft", selector="all")
    results = metrics_file("m.json", {"dynamic": {"nq": ["oil", "oil", "oil", "gas"], "popqa": ["oil"], "mine": ["oil"]}, "all": {"nq": ["gas"]}})
    publish.main([model, "--repo", "me/tiny", "--results", results])
    found = {name: parse_eval_result_entries(yaml.safe_load(content)) for name, content in hub.files("me/tiny").items() if name.startswith(".eval_results/")}
    assert {name: [(entry.dataset_id, entry.task_id) for entry in entries] for name, entries in found.items()} == {
        ".eval_results/nq.yaml": [(publish.EVAL_DATASET, "nq")], ".eval_results/popqa.yaml": [(publish.EVAL_DATASET, "popqa")],
    }
    [entry] = found[".eval_results/nq.yaml"]
    group = json.loads(Path(results).read_text())["results"]["dynamic"]["groups"]["nq"]
    assert entry.value == 75.0 and names(entry.notes, f"{group['low']:.1f}", f"{group['high']:.1f}", "em") and entry.date.startswith("20")
    assert logged(caplog, "mine", publish.EVAL_DATASET, level="INFO") == 1


def test_results_of_another_model_or_other_words_are_noticed(model, hub, caplog):
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    answered_by("a", "other")
    answered_by("b", f"{model}/sft", prompts="p.yaml", template=str(REPO / "template/smollm2.jinja"))
    answered_by("c", f"{model}/sft", template=str(REPO / "template/llama3.jinja"))
    Path("same.jinja").write_text((REPO / "template/llama3.jinja").read_text() + "{#- the same prompts -#}")
    answered_by("e", f"{model}/sft", template="same.jinja")
    publish.main([model, "--dry_run", "--results", metrics_file("m.json", {name: {"nq": ["oil"]} for name in "abcde"})])
    assert logged(caplog, "a", "other") == logged(caplog, "b", "--prompts", "p.yaml") == logged(caplog, "b", "smollm2.jinja") == logged(caplog, "d") == 1
    assert not logged(caplog, "c") and not logged(caplog, "e")


def test_scores_of_another_model_are_in_the_card_only(model, hub):
    """scripts/10_evaluate.sh writes one metrics file for all models that have answered a set."""
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    answered_by("theirs", "other")
    answered_by("ours", f"{model}/sft")
    publish.main([model, "--repo", "me/tiny", "--results", metrics_file("m.json", {"theirs": {"nq": ["oil"], "popqa": ["oil"]}, "ours": {"nq": ["gas"]}})])
    files = hub.files("me/tiny")
    assert [name for name in files if name.startswith(".eval_results/")] == [".eval_results/nq.yaml"]
    assert [entry["value"] for entry in yaml.safe_load(files[".eval_results/nq.yaml"])] == [0.0]
    assert all(re.search(rf"^\| {name} ", files["README.md"].decode(), re.MULTILINE) for name in ("theirs", "ours"))


@pytest.mark.parametrize("content", ["[]", "{broken", '{"results": {}}', '{"results": {"a": {"n": 1}}, "arguments": {"results_file": ["a.json"]}}', None])
def test_a_file_that_is_no_metrics_is_named(model, content):
    if content is not None:
        Path("m.json").write_text(content)
    with pytest.raises(UserError, match=at("m.json")):
        publish.main([model, "--dry_run", "--results", "m.json"])


def test_prompts_are_written_so_that_they_are_read_back(tmp_path):
    (tmp_path / "p.yaml").write_text(OTHER_PROMPTS)
    for path in (None, str(tmp_path / "p.yaml")):
        prompts = Prompts(path)
        (tmp_path / PROMPTS).write_text(prompts_yaml(prompts))
        again = Prompts(str(tmp_path / PROMPTS))
        assert again.for_file() == prompts.for_file() and "judge" not in again.for_file()
        assert again.instruction({"dataset": "nq"}) == prompts.instruction({"dataset": "nq"})
        assert again.reranker("who?", question()["docs"]) == prompts.reranker("who?", question()["docs"])


# ---------------------------------------------------------------- refused


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Tiny"}')


REFUSED = {
    "an adapter": (adapter, ("sft", "llamafactory-cli", "export", "meta-llama/Tiny", "lora")),
    "pickled weights": (lambda folder: (folder / "pytorch_model.bin").write_text("x"), ("pytorch_model.bin",)),
    "other pickled weights": (lambda folder: (folder / "consolidated.00.pth").write_text("x"), ("consolidated.00.pth",)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("sft",)),
    "a shard that is missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}'), ("model-2.safetensors",)),
    "a training that goes on": (lambda folder: (folder / "training_on.sha256").write_text("x"), ("sft",)),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_folder_that_is_no_finished_model_is_refused(problem, model, hub):
    make, place = REFUSED[problem]
    make(Path(model) / "sft")
    with pytest.raises(UserError, match=at(*place)):
        publish.main([f"{model}/sft", "--repo", "me/tiny"])
    assert hub.requests == [] and not Path(f"{model}/sft.published").exists()


def test_a_repository_and_a_folder_are_needed(model):
    with pytest.raises(UserError, match=at("--repo")):
        publish.main([model])
    with pytest.raises(UserError, match=at("owner/on_the_hub")):
        publish.main(["owner/on_the_hub", "--dry_run"])


# ---------------------------------------------------------------- the hub refuses


@pytest.mark.parametrize(("problem", "place"), [
    ("no token", ("me/tiny", "HF_TOKEN")), ("a wrong token", ("me/tiny", "HF_TOKEN")), ("no network", ("me/tiny", "HF_ENDPOINT")),
    ("offline", ("me/tiny", "HF_HUB_OFFLINE=0")), ("no name", ("me/a/b",)), ("no owner", ("other", "OWNER/NAME", "me/other")), ("a public repository", ("me/tiny", "--private")),
])
def test_what_the_hub_refuses_is_one_line(problem, place, model, hub, monkeypatch):
    from huggingface_hub import constants

    hub.add("me/tiny", {"README.md": b""})
    if problem == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif problem == "a wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif problem == "no network":
        hub.stop()
    elif problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=at(*place)) as error:
        publish.main([model, "--repo", place[0], *(["--private"] if problem == "a public repository" else [])])
    assert "\n" not in str(error.value)
    assert hub.files("me/tiny") == {"README.md": b""} and [*hub.repositories] == [("model", "me/tiny")]


def test_a_token_that_may_not_write_is_one_line(model, hub, monkeypatch):
    """The hub knows the account, and refuses the commit."""
    from local_hub import _Handler

    post = _Handler.do_POST

    def do_POST(self) -> None:
        if "/commit/" not in self.place:
            return post(self)
        self.rfile.read(int(self.headers["Content-Length"]))
        return self.json({"error": "no write"}, 403)

    monkeypatch.setattr(_Handler, "do_POST", do_POST)
    with pytest.raises(UserError, match=at("me/tiny", "HF_TOKEN")) as error:
        publish.main([model, "--repo", "me/tiny"])
    assert "\n" not in str(error.value) and hub.repositories["model", "me/tiny"].commits == {}


def test_private_makes_a_private_repository(model, hub):
    publish.main([model, "--repo", "me/tiny", "--private"])
    publish.main([model, "--repo", "me/tiny", "--private"])
    assert hub.repositories["model", "me/tiny"].private


@pytest.mark.parametrize("problem", ["gated", "private", "absent"])
def test_a_model_that_the_hub_does_not_deliver_is_named(problem, model, hub, monkeypatch):
    publish.main([model, "--repo", "me/tiny"])
    repository = hub.repositories["model", "me/tiny"]
    repository.gated, repository.private = problem == "gated", problem == "private"
    monkeypatch.delenv("HF_TOKEN")
    name = "me/absent" if problem == "absent" else "me/tiny"
    with pytest.raises(UserError, match=at(name, "HF_TOKEN")) as error:
        infer(name, "out.json")
    assert "\n" not in str(error.value)


def test_a_pulled_model_needs_no_network_again(model, hub, stub, monkeypatch):
    from huggingface_hub import constants

    publish.main([model, "--repo", "me/tiny"])
    first = infer("me/tiny", "a.json")
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert infer("me/tiny", "b.json") == first and stub[1].args.llm_model == stub[0].args.llm_model
    assert manifest_of("me/never") is None


# ---------------------------------------------------------------- which prompts and which template


def published(model: str) -> str:
    """The published files as a local folder."""
    publish.main([model, "--prompts", "p.yaml", "--dry_run", "--output_dir", "local"])
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(f"{model}/sft/{name}", "local")
    return "local"


def test_a_flag_wins_over_the_model_and_differences_are_noticed(model, caplog):
    caplog.set_level("INFO")
    local = published(model)
    caplog.clear()
    assert prompts_for(local, None) == f"{local}/{PROMPTS}" and logged(caplog, f"{local}/{PROMPTS}", level="INFO") == 1
    assert prompts_for(local, "p.yaml") == "p.yaml" and not logged(caplog), "they say the same"
    Path("other.yaml").write_text('generator: {separator: "\\n\\n\\n"}')
    assert prompts_for(local, "other.yaml") == "other.yaml" and logged(caplog, "--prompts", "other.yaml", f"{local}/{PROMPTS}") == 1
    assert prompts_for(f"{model}/sft", None) is None and logged(caplog, "dynamicrag/llm/prompt_texts.py", level="INFO") == 1

    caplog.clear()
    llama3 = str(REPO / "template/llama3.jinja")
    assert load_prompts(local, llama3).name == llama3 and not logged(caplog)
    Path("t.jinja").write_text(Path(llama3).read_text().replace("<|eot_id|>", "\n<|eot_id|>"))
    assert load_prompts(local, "t.jinja").name == "t.jinja" and logged(caplog, "--template", "t.jinja", f"{local}/{TEMPLATE}") == 1
    assert load_prompts(f"{model}/sft", "t.jinja").name == "t.jinja" and logged(caplog) == 1, "an unpublished base model's own template says little"


def test_selector_and_generator_are_each_asked_in_their_own_words(model, stub):
    local = published(model)
    infer(f"{model}/sft", "out.json", "--reranker-model", local)
    generator, chooser = stub
    assert "You choose with care." in str(asked(chooser)) and "Answer {briefly}." not in str(asked(generator))
    assert chooser.args.llm_model == local


def test_a_prompts_file_that_was_changed_is_noticed(model, caplog):
    local = published(model)
    with Path(local, PROMPTS).open("a") as file:
        file.write("\n")
    caplog.clear()
    assert prompts_for(local, None) and logged(caplog, PROMPTS, MANIFEST) == 1
    Path(local, MANIFEST).write_text('{"files": {"x": 1}}')
    with pytest.raises(UserError, match=at(MANIFEST)):
        prompts_for(local, None)


def test_a_servers_model_is_looked_up_nowhere(model, hub):
    assert engine_inputs(EngineOptions("me/tiny", api_base="http://127.0.0.1:9"), CallOptions()) == [] and hub.requests == []
    with pytest.raises(UserError, match=naming("missing/model")):
        load_prompts("missing/model", "auto")
