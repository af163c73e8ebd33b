"""No input runs code. Every flag that names a file gets files that would write a canary file if they were run.

Each payload is first tried on the loader for which it was made. So a missing canary means that the stage did not run the payload.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from running import good_input, make_good, run
from stages import MODEL_FLAGS, REPO, SCORERS, STAGES, flags_of, row

CODE = "open({canary!r}, 'w').close()"


class Payload:
    """Pickles as a call of exec()."""

    def __init__(self, canary: Path):
        self.code = CODE.format(canary=str(canary))

    def __reduce__(self):
        return exec, (self.code,)


def saved_by_numpy(canary: Path) -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return raw.getvalue()


def saved_by_torch(canary: Path, **changes) -> bytes:
    import torch

    raw = io.BytesIO()
    torch.save({"model": {"embeddings.x": Payload(canary)}, **changes}, raw, **({"_use_new_zipfile_serialization": False} if changes else {}))
    return raw.getvalue()


JINJA = "{{ messages }}{{ cycler.__init__.__globals__.os.close(cycler.__init__.__globals__.os.open(%r, 64)) }}"
# Content by the loader for which it is made.
PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda canary: pickle.dumps(Payload(canary)),
    "pickle as published embeddings are": lambda canary: pickle.dumps((["p1"], Payload(canary)), protocol=2),
    "numpy": saved_by_numpy,
    "torch": saved_by_torch,
    "torch of old": lambda canary: saved_by_torch(canary, opt=None),
    "YAML": lambda canary: f"reranker: !!python/object/apply:exec [\"{CODE.format(canary=str(canary))}\"]\n".encode(),
    "Jinja": lambda canary: (JINJA % str(canary)).encode(),
    "Python": lambda canary: f"{CODE.format(canary=str(canary))}\n".encode(),
    "shell": lambda canary: f"#!/bin/sh\ntouch {canary}\n".encode(),
    "rows": lambda canary: "".join(
        json.dumps(row(n, id=f"{text}{n}", question=text, dataset=text, docs=[{"id": text, "title": text, "text": text, "score": 1.0, "rerank_score": 0.9, "rerank_label": "true"}],
                       id_lists=[[1], []], true_id=[1], false_id=[], sequence=[1], docs_shown=1, final_docs=None)) + "\n"
        for n, text in enumerate([f"$(touch {canary})", f"`touch {canary}`", f"; touch {canary} #", f"|touch {canary}", JINJA % str(canary), f"{{question.__class__}} touch {canary}"])
    ).encode(),
}
NO_INPUTS = set(
    "--list --name --dry_run --limit --revision --models_dir --keep_downloads --run_name --corpus --encoder "
    "--help --seed --overwrite --on_error --dataset --num_splits --n_docs --index --nprobe --candidates --corpus_shard --questions_per_pass --normalize --pooling --query_prompt --passage_prompt --instruction --system_prompt --max_length "
    "--batch_tokens --dtype --device --shard_id --num_shards --logits --sort --targets --labels --max_per_length --max_rows --sft_size --dpo_size --dev_size --max_docs --documents "
    "--num-samples --temperature --top-p --topn --n-docs --include-expert --permute --api-base --enable-thinking --tensor-parallel-size --max-model-len --gpu-memory-utilization "
    "--selection-temperature --selection-max-tokens --answer-max-tokens --constrain-ids --chunk-size --chunk_size --weights --reweight --answer-match --length-of --bert_layer --bert_baseline "
    "--judge-base-url --judge-model --judge-format --judge-limit --judge-concurrency --recipe --keep-mean --pairs --min-margin --max-pairs-per-question "
    "--answer-order --baseline-top --keep-equal --roles --min-distance --generator-chosen --max-reranker-pairs --max-generator-pairs --selector --max-context-window --order --metric --entity_support --compare --group_by --stage --k "
    "--cutoff_len --pair-by --output_dir --output_file --sequence_file --normal_file --sft_file --dpo_file --dev_file --output-json --output-jsonl --remain-output-json --reranker_file "
    "--generator_file --table_file --run_file --input-jsonl".split()
)


@pytest.fixture(scope="module")
def good(tmp_path_factory, encoder_dir, monot5_dir, shards_dir, corpus_tsv) -> Path:
    folder = make_good(tmp_path_factory.mktemp("good"), encoder_dir)
    (folder / "corpus.tsv").unlink()
    for name, target in {"monot5": monot5_dir, "embeddings": shards_dir, "corpus.tsv": corpus_tsv}.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run_with(stage: str, flag: str, bad: Path, good: Path, out: Path, monkeypatch) -> tuple[int, list[str]]:
    """Run a stage with `flag` naming the bad file. If it asks a question on the terminal, the answer is yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    known = STAGES[stage]
    more = f"{(known.inputs | known.full_inputs)[flag]} {flag} {bad}{'' if stage in SCORERS else ' --overwrite'}"
    return run(stage, flags_of(stage, good, out, good_input(stage, good), more, full=flag in known.full_inputs), monkeypatch)


# ---------------------------------------------------------------- the payloads are live, and the flags are all there are


def test_every_payload_writes_its_canary_where_it_is_run(tmp_path):
    import jinja2
    import torch
    import yaml

    def save(content: bytes) -> Path:
        (tmp_path / "payload").write_bytes(content)
        return tmp_path / "payload"

    runs: dict[str, Callable[[bytes], object]] = {
        "pickle": pickle.loads, "pickle as published embeddings are": pickle.loads, "numpy": lambda raw: np.load(io.BytesIO(raw), allow_pickle=True),
        "torch": lambda raw: torch.load(io.BytesIO(raw), weights_only=False), "torch of old": lambda raw: torch.load(io.BytesIO(raw), weights_only=False),
        "YAML": yaml.unsafe_load, "Jinja": lambda raw: jinja2.Environment().from_string(raw.decode()).render(),
        "Python": exec, "shell": lambda raw: os.system(f"sh {save(raw)}"), "rows": lambda raw: os.system(f"echo {json.loads(raw.splitlines()[0])['question']} >/dev/null"),
    }
    for name, make in PAYLOADS.items():
        canary = tmp_path / f"canary of {name}".replace(" ", "_")
        runs[name](make(canary))
        assert canary.exists(), name


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_that_names_an_input_is_tried(stage):
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        importlib.import_module(stage).parse_args(["--help"])
    flags = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)(?=[ ,\n])", said.getvalue().split("\noptions:\n")[1]))
    stated = ({*STAGES[stage].inputs, *STAGES[stage].full_inputs}, NO_INPUTS, {STAGES[stage].input})
    inputs, others, first = ({flag.replace("_", "-") for flag in some} for some in stated)  # as the help shows them
    assert flags - inputs - others == set()
    assert first <= inputs <= flags


# ---------------------------------------------------------------- files


# Flags of rows, which all stages read with one reader.
ROWS_FLAGS = {"--query", "--input_file", "--input_files", "--input-json", "--results_file", "--remain_file", "--eval_file", "--questions"}


def payloads_of_flags() -> Iterator[tuple[str, str, str]]:
    """Every payload for the first flag of each reader, and a few for the other flags. FULL=1: every payload for every flag."""
    met = set()
    for name, stage in STAGES.items():
        for flag in (*stage.inputs, *stage.full_inputs):
            reader = "rows" if flag in ROWS_FLAGS else flag
            few = reader in met and not os.environ.get("FULL")
            met.add(reader)
            yield from ((name, flag, payload) for payload in (("pickle", "Jinja", "rows") if few else PAYLOADS))


@pytest.mark.parametrize(("stage", "flag", "payload"), payloads_of_flags())
def test_no_file_runs(stage, flag, payload, good, out, monkeypatch):
    canary = out.parent / "canary"
    suffixes = {"--passages": (".tsv", ".jsonl", ".parquet"), "--passages_embeddings": (".npy", ".pkl", "")}.get(flag, ("",))
    for suffix in suffixes:
        bad = out.parent / f"bad_0{suffix}"
        bad.write_bytes(PAYLOADS[payload](canary))
        if suffix == ".npy":
            shutil.copy(bad, bad.with_suffix(".ids.npy"))
        status, said = run_with(stage, flag, bad, good, out, monkeypatch)
        assert status in (0, 2) and len(said) == (1 if status else 0), said
        assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_file_beside_another_runs(payload, good, out, monkeypatch):
    """Manifests, caches of a corpus, and other files in a corpus's folder, such as the loading scripts that hubs have."""
    canary, content = out.parent / "canary", PAYLOADS[payload](out.parent / "canary")
    folder = out.parent / "corpus"
    folder.mkdir()
    shutil.copy(good / "corpus.tsv", folder)
    for name in ("corpus.py", "__init__.py", "dataset_infos.txt", "README.md", "setup.py", "conftest.py"):
        (folder / name).write_bytes(content)
    rows = out.parent / "rows_0.jsonl"
    shutil.copy(good / "rows_0.jsonl", rows)
    store = f"--passages {folder} --passage_store {out}/store --index bm25"
    assert run("retriever", flags_of("retriever", good, out, rows, store), monkeypatch) == (0, [])
    kept = [path for path in (out / "store").rglob("*") if path.is_file()]
    assert len(kept) > 6
    for path in [*kept, out / "retrieved.jsonl.manifest.json", out / "retrieved.jsonl.partial"]:
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        status, said = run("retriever", flags_of("retriever", good, out, rows, f"{store} --overwrite"), monkeypatch)
        assert status in (0, 2) and len(said) == (1 if status else 0), (path, said)
        if before is not None and path.parent.is_dir():
            path.write_bytes(before)
    Path(f"{rows}.manifest.json").write_bytes(content)
    for name in ("aggregate", "evaluate"):
        assert run(name, flags_of(name, good, out, rows), monkeypatch)[0] == 2
    assert not canary.exists()


# ---------------------------------------------------------------- models

MODULE = """
{code}
from transformers import BertConfig, BertModel, BertTokenizer

class Config(BertConfig):
    model_type = "other"

class Model(BertModel):
    config_class = Config

class Tokenizer(BertTokenizer):
    pass
"""
MAPS = {f"Auto{name}": f"other.{kind}" for name, kind in {
    "Config": "Config", "Model": "Model", "ModelForSeq2SeqLM": "Model", "ModelForSequenceClassification": "Model", "Tokenizer": "Tokenizer",
}.items()}


def brings_code(folder: Path, canary: Path, **config) -> None:
    (folder / "other.py").write_text(MODULE.format(code=CODE.format(canary=str(canary))))
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((folder / name).read_text())
        maps = {"AutoTokenizer": ["other.Tokenizer", None]} if name == "tokenizer_config.json" else MAPS
        (folder / name).write_text(json.dumps({**known, **(config if name == "config.json" else {}), "auto_map": maps}))


def has_pickled_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(saved_by_torch(canary))


def has_a_checkpoint(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint.pth").write_bytes(saved_by_torch(canary))


def names_another_base(folder: Path, canary: Path) -> None:
    """A checkpoint with nothing but weights, whose arguments name a model with code."""
    from argparse import Namespace

    import torch

    other = folder.with_name("other")
    shutil.copytree(folder, other)
    brings_code(other, canary, model_type="other")
    for path in folder.iterdir():
        path.unlink()
    torch.save({"model": {"embeddings.x": torch.zeros(1)}, "opt": Namespace(retriever_model_id=str(other))}, folder / "checkpoint.pth")


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "code for a kind transformers knows": lambda folder, canary: brings_code(folder, canary),
    "code for a kind it does not know": lambda folder, canary: brings_code(folder, canary, model_type="other"),
    "code for a kind of which it knows the configuration alone": lambda folder, canary: brings_code(folder, canary, model_type="clap_text_model"),
    "code for a tokenizer": lambda folder, canary: (brings_code(folder, canary), (folder / "tokenizer.json").unlink()),
    "pickled weights": has_pickled_weights,
    "a pickled checkpoint": has_a_checkpoint,
    "a checkpoint that names a model with code": names_another_base,
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(("stage", "flag"), [(name, flag) for name, stage in STAGES.items() for flag in (*stage.inputs, *stage.full_inputs) if flag in MODEL_FLAGS])
def test_no_model_runs(stage, flag, kind, good, out, monkeypatch):
    """The LLM itself is not loaded here. vLLM never gets trust_remote_code: see the last test."""
    folder, canary = out.parent / "bad_0", out.parent / "canary"
    shutil.copytree(good / ("monot5" if stage == "reranker" else "encoder"), folder)
    FOLDERS[kind](folder, canary)
    status, said = run_with(stage, flag, folder, good, out, monkeypatch)
    assert not canary.exists()
    assert len(said) == (1 if status else 0) and all(str(folder) in line for line in said), said
    may_be_loaded = flag in ("--llm-model", "--reranker-model") or kind in ("code for a kind transformers knows", "code for a tokenizer")
    assert status == 2 or (status == 0 and may_be_loaded)


def test_the_code_of_a_model_runs_where_it_is_trusted(good, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for number, auto in enumerate((AutoConfig, AutoTokenizer)):
        folder, canary = tmp_path / f"m{number}", tmp_path / f"canary{number}"
        shutil.copytree(good / "encoder", folder)
        brings_code(folder, canary, model_type="other")
        with contextlib.suppress(ValueError, OSError, AttributeError):
            auto.from_pretrained(folder, trust_remote_code=True)
        assert canary.exists(), auto


def test_nothing_in_the_repository_trusts_remote_code():
    tracked = (path for suffix in ("py", "sh", "yaml", "env", "json") for path in [*REPO.glob(f"*.{suffix}"), *(
        path for folder in ("dynamicrag", "scripts", "recipes", "configs", "examples", "benchmarks") for path in (REPO / folder).rglob(f"*.{suffix}"))])
    said = {line.strip() for path in tracked for line in path.read_text(encoding="utf-8").splitlines() if re.search("trust.?remote.?code", line, re.IGNORECASE)}
    told = {line for line in said if not line.startswith(("#", '"""'))}
    assert told == {'NO_CODE: dict[str, Any] = {"trust_remote_code": False}', *(line for line in told if "TIME_OUT_REMOTE_CODE" in line)}
