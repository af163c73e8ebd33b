"""Published data, models and shared runs, from a hub on this machine, through interruptions, refusals and full disks."""

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import at, logged, names, naming, read_jsonl, write_jsonl
from local_hub import LocalHub
from pages import table
from stages import REPO

import prepare_data
from dynamicrag.files import downloads, published
from dynamicrag.files.archives import unpack_corpus
from dynamicrag.rows.published_rows import dataset_in
from dynamicrag.search.corpus import read_passages
from dynamicrag.search.shards import find_shards, open_shards
from dynamicrag.stage import UserError

EVAL, TRAINING, FLASHRAG = "gasolsun/DynamicRAG-Eval-Data", "gasolsun/DynamicRAG_Training_Data_150k", "RUC-NLPIR/FlashRAG_datasets"
CTXS = [{"title": f"River {n}", "text": f"The river {n} is {n}0 km long."} for n in range(1, 5)]
SETS = published.published()


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def flashrag(count: int, split: str = "test") -> bytes:
    return lines([{"id": f"{split}_{n}", "question": f"how long is river {n}?", "golden_answers": [f"{n}0 km"], "metadata": {}} for n in range(count)])


def evaluation(count: int) -> bytes:
    return lines([{"id": str(n), "question": f"how long is river {n}?", "answers": [f"{n}0 km"], "ctxs": CTXS} for n in range(count)])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, used by this process; no retry waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "MAX_WAIT", 0)
    with LocalHub() as started:
        started.connect(monkeypatch, tmp_path / "cache")
        yield started


def prepare(*flags: str) -> None:
    prepare_data.main(["--name", *flags])


def change(monkeypatch, name: str, **changes: object) -> None:
    """Change one entry of the table."""
    table = {**published.published(), name: replace(published.published()[name], **changes)}
    monkeypatch.setattr(published, "published", lambda: table)
    monkeypatch.setattr(prepare_data, "published", lambda: table)


def forecast(capsys, *flags: str) -> dict[str, list[str]]:
    """The cells of what --dry_run shows, by name: becomes, size, to download, there already, licence, note."""
    prepare(*flags, "--dry_run")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("|")]
    return {name: cells for name, *cells in lines}


def written(folder: Path = Path("data")) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- the table


def test_every_set_says_where_it_goes_and_what_nobody_verified(capsys):
    prepare_data.main(["--list"])
    shown = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[2:]}
    assert shown.keys() == SETS.keys()
    assert all(names(shown[name], entry.place, entry.unverified.split(",")[0]) for name, entry in SETS.items())
    paths = [entry.path("data", "models") for entry in SETS.values()]
    assert len(set(paths)) == len(paths)


def on_the_page(entry: published.Published) -> list[str]:
    """The line of a set in docs/data.md."""
    source = f"`{entry.repo}`" if entry.repo else f"[{entry.url.rsplit('/', 1)[1]}]({entry.url})"
    files = "" if entry.kind == "model" else ", ".join(f"`{name}`" for name in entry.files)
    return [f"`{entry.name}`", f"{source} {files}".strip(), f"{entry.rows:,}" if entry.rows else "", entry.licence, entry.stage, entry.unverified]


def test_every_set_of_the_table_is_on_the_page():
    page = (REPO / "docs/data.md").read_text(encoding="utf-8")
    assert table(page, "name | published in") == [on_the_page(entry) for entry in SETS.values()]


@pytest.mark.parametrize("name", [name for name, entry in SETS.items() if entry.dataset and entry.dataset != "from_id"])
def test_the_data_set_of_an_entry_is_one_that_has_a_metric(name):
    from dynamicrag.rows.tasks import TASKS

    assert SETS[name].dataset in TASKS


@pytest.mark.parametrize(("name", "meant"), [
    ("nq", ["dynamicrag_nq", "flashrag_nq"]), ("dynamicrag_ng", ["dynamicrag_nq"]), ("DynamicRag_nq", ["dynamicrag_nq"]), ("dynamicrag-8b", ["DynamicRAG-8B"]), ("xyz", []),
])
def test_a_name_that_is_not_in_the_table_is_refused_beside_those_that_may_be_meant(name, meant):
    with pytest.raises(UserError, match=at(f"--name {name}", *meant)) as refused:
        prepare("dynamicrag_fever", name)
    assert [other for other in SETS if names(str(refused.value), other)] == meant
    with pytest.raises(UserError, match=at("--name")):
        prepare_data.main([])


# ---------------------------------------------------------------- rows


def test_sets_with_the_same_ids_become_files_and_rows_of_their_own(hub, tmp_path):
    commit = hub.add(FLASHRAG, {"nq/test.jsonl": flashrag(3), "hotpotqa/dev.jsonl": flashrag(3)}, "dataset")
    prepare("flashrag_nq", "flashrag_hotpotqa")
    rows = {name: read_jsonl(tmp_path / f"data/prepared/{name}.jsonl") for name in ("flashrag_nq", "flashrag_hotpotqa")}
    ids = [row["id"] for part in rows.values() for row in part]
    assert len(set(ids)) == 6 and rows["flashrag_nq"][0]["source_id"] == rows["flashrag_hotpotqa"][0]["source_id"] == "test_0"
    assert {row["dataset"] for row in rows["flashrag_hotpotqa"]} == {"hotpotqa"} and rows["flashrag_nq"][2]["answers"] == ["20 km"]
    manifest = json.loads(Path("data/prepared/flashrag_nq.jsonl.manifest.json").read_bytes())
    assert manifest["resolved"] == {"version": commit, "file": "nq/test.jsonl", "sha256": hashlib.sha256(flashrag(3)).hexdigest()}
    assert manifest["arguments"]["place"] == FLASHRAG and manifest["counts"] == {"rows": 3, "with_documents": 0, "without_answers": 0, "without_dataset": 0}
    assert not Path("data/prepared/downloads/flashrag_nq").exists()


def test_a_complete_set_is_not_asked_for_again(hub):
    hub.add(FLASHRAG, {"nq/test.jsonl": flashrag(3)}, "dataset")
    prepare("flashrag_nq")
    hub.stop()
    prepare("flashrag_nq")
    with pytest.raises(UserError, match=naming("limit", 2)):
        prepare("flashrag_nq", "--limit", "2")


def test_published_forms_are_read_and_each_row_has_its_data_set(hub, tmp_path):
    readings = [{"question": "the upper?", "short_answers": ["30 km", "30 kilometres"]}, {"question": "the lower?", "short_answers": ["40 km"]}]
    asqa = [{"sample_id": "-70", "question": "How long is the river?", "qa_pairs": readings, "docs": [{"id": "1", **CTXS[0]}], "answer": "30 km, 40 km"}]
    hub.add(EVAL, {
        "asqa_eval_gtr_top100.json": json.dumps(asqa).encode(),  # an array, as ALCE ships it
        "eval/popqa.jsonl": lines([{"id": 7, "question": "q?", "answers": ["a"], "ctxs": CTXS}]),
        "arc_challenge.jsonl": lines([{"id": "Mercury_0", "question": "Which is a metal?\nA: iron\nB: wood", "answers": ["A"], "ctxs": CTXS}]),
    }, "dataset")
    prepare("dynamicrag_asqa", "dynamicrag_popqa", "dynamicrag_arc_challenge", "--limit", "5")
    [asqa_row], [popqa], [arc] = (read_jsonl(tmp_path / f"data/prepared/dynamicrag_{name}.jsonl") for name in ("asqa", "popqa", "arc_challenge"))
    assert (asqa_row["id"], asqa_row["dataset"], asqa_row["qa_pairs"]) == ("dynamicrag_asqa_-70", "asqa", readings)
    assert (popqa["id"], popqa["dataset"], len(popqa["docs"])) == ("dynamicrag_popqa_7", "popqa", 4)
    assert (arc["dataset"], arc["answers"]) == ("arc", ["A"])


def test_readings_of_a_question_are_taken_from_flashrags_metadata(hub, tmp_path):
    pairs = [{"short_answers": ["a"]}, {"short_answers": ["b"]}]
    hub.add(FLASHRAG, {"asqa/dev.jsonl": lines([{"id": "dev_0", "question": "q?", "golden_answers": ["a", "b"], "metadata": {"qa_pairs": pairs}}])}, "dataset")
    prepare("flashrag_asqa")
    assert read_jsonl(tmp_path / "data/prepared/flashrag_asqa.jsonl")[0]["qa_pairs"] == pairs


@pytest.mark.parametrize(("row_id", "dataset"), [
    ("nq_17", "nq"), ("train-fever-3", "fever"), ("tc_99", "triviaqa"), ("x_hotpotqa_5ab", "hotpotqa"), ("ASQA-1", "asqa"), ("eli5_q", "eli5"),
    ("batch_3", None), ("unq1", None), ("17", None),
])
def test_the_data_set_of_a_training_row_stands_in_its_id(row_id, dataset):
    assert dataset_in(row_id) == dataset


def test_malformed_rows_are_refused_or_set_aside(hub, tmp_path):
    hub.add(EVAL, {"nq.jsonl": evaluation(2) + b'{"id": "9"}\n'}, "dataset")
    with pytest.raises(UserError, match=at("nq.jsonl:3", "question")):
        prepare("dynamicrag_nq")
    prepare("dynamicrag_nq", "--on_error", "skip", "--overwrite")
    assert len(read_jsonl(tmp_path / "data/prepared/dynamicrag_nq.jsonl")) == 2
    assert read_jsonl(tmp_path / "data/prepared/dynamicrag_nq.jsonl.rejected.jsonl")[0]["line"] == 3


# ---------------------------------------------------------------- downloads


def test_a_limit_downloads_the_beginning_of_a_large_file_alone(hub, tmp_path):
    rows = [{"id": f"nq_{n}", "question": "q?", "answer": "a", "docs": [{"title": "t", "text": "x" * 9000, "rerank_label": "true"}]} for n in range(300)]
    hub.add(TRAINING, {"train.jsonl": lines(rows)}, "dataset")
    prepare("dynamicrag_training", "--limit", "20")
    got = read_jsonl(tmp_path / "data/prepared/dynamicrag_training.jsonl")
    assert [row["source_id"] for row in got] == [f"nq_{n}" for n in range(20)] and got[0]["docs"][0]["rerank_label"] == "true"
    assert sum(request.sent for request in hub.downloads("train.jsonl")) <= 300_000 < len(lines(rows))


@pytest.mark.parametrize("source", ["hub", "url"])
def test_an_interrupted_download_continues_and_fetches_only_the_rest(hub, monkeypatch, source):
    content = gzip.compress(b"id\ttext\ttitle\n" + b"".join(f"{n}\ttext {os.urandom(20).hex()}\tt\n".encode() for n in range(9000)), mtime=0)
    if source == "hub":
        hub.add(FLASHRAG, {"corpus.tsv.gz": content}, "dataset")
        change(monkeypatch, "psgs_w100", url=None, repo=FLASHRAG, repo_type="dataset", files=("corpus.tsv.gz",))
    else:
        change(monkeypatch, "psgs_w100", url=hub.serve("corpus.tsv.gz", content))
    hub.interrupt("corpus.tsv.gz", after=100_000)
    hub.interrupt("corpus.tsv.gz", after=50_000)
    prepare("psgs_w100")
    requests = hub.downloads("corpus.tsv.gz")
    assert [request.range for request in requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert sum(request.sent for request in requests) == len(content)
    assert Path("data/prepared/psgs_w100.tsv.gz").read_bytes() == content


def test_the_next_run_continues_what_an_earlier_one_began_unless_the_file_has_changed(hub, monkeypatch):
    content = os.urandom(300_000)
    change(monkeypatch, "psgs_w100", url=hub.serve("c.tsv.gz", content))
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    for _ in range(2):
        hub.interrupt("c.tsv.gz", after=120_000)
        with pytest.raises(UserError, match=at(f"{hub.url}/plain/c.tsv.gz")):
            prepare("psgs_w100")
    assert Path("data/prepared/psgs_w100.tsv.gz.download").stat().st_size == 240_000
    other = os.urandom(300_000)
    hub.serve("c.tsv.gz", other)
    prepare("psgs_w100")
    assert [request.range for request in hub.downloads("c.tsv.gz")] == [None, "bytes=120000-", None]
    assert Path("data/prepared/psgs_w100.tsv.gz").read_bytes() == other and written() == ["psgs_w100.tsv.gz", "psgs_w100.tsv.gz.manifest.json"]


@pytest.mark.parametrize("source", ["hub", "url"])
def test_a_file_with_a_wrong_hash_is_refused_and_nothing_is_left(hub, monkeypatch, source):
    content = os.urandom(5000)
    right = hashlib.sha256(content).hexdigest()
    if source == "hub":  # which says the hash of a large file itself
        hub.add(FLASHRAG, {"retrieval-corpus/wiki18_100w.zip": content}, "dataset")
        hub.damage(".zip")
        name = "wiki18_100w"
    else:
        change(monkeypatch, "psgs_w100", url=hub.serve("c.tsv.gz", b"x" + content[1:]), sha256=right)
        name = "psgs_w100"
    with pytest.raises(UserError, match=naming(right)):
        prepare(name)
    assert written() == []


def test_a_missing_file_is_named_beside_those_that_are_there(hub):
    hub.add(EVAL, {"triviaqa.jsonl": evaluation(1)}, "dataset")
    with pytest.raises(UserError, match=at(EVAL, "popqa.json*", "triviaqa.jsonl")):
        prepare("dynamicrag_popqa")
    with pytest.raises(UserError, match=at(TRAINING)):
        prepare("dynamicrag_training")
    with pytest.raises(UserError, match=at(EVAL, "--revision")):
        prepare("dynamicrag_triviaqa", "--revision", "v9")
    with pytest.raises(UserError, match=at("a/b/c")):
        prepare_data.main(["--shared_runs", "a/b/c", "--name", "x"])


def test_one_set_that_cannot_be_had_does_not_stop_the_others(hub, caplog):
    hub.add(EVAL, {"triviaqa.jsonl": evaluation(1)}, "dataset")
    with pytest.raises(UserError, match=at("--name", 1, 2, "dynamicrag_nq")):
        prepare("dynamicrag_nq", "dynamicrag_triviaqa")
    assert Path("data/prepared/dynamicrag_triviaqa.jsonl").exists() and logged(caplog, EVAL, "nq.json*", level="ERROR") == 1


def test_a_gated_repository_is_explained_and_opens_with_a_token(hub, monkeypatch):
    hub.add("meta-llama/Llama-2-7b-hf", {"config.json": b"{}", "model.safetensors": b"w" * 100}, gated=True)
    place = ("meta-llama/Llama-2-7b-hf", "gated", "HF_TOKEN", f"{hub.url}/meta-llama/Llama-2-7b-hf")
    with pytest.raises(UserError, match=at(*place)):
        prepare("Llama-2-7b-hf")
    assert not Path("models/Llama-2-7b-hf").exists(), "nothing arrived"
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UserError, match=at(*place)):
        prepare("Llama-2-7b-hf")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    prepare("Llama-2-7b-hf")
    assert written(Path("models/Llama-2-7b-hf")) == ["config.json", "model.safetensors"]
    assert not [path for path in Path().rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]


def test_a_disk_that_is_too_small_is_noticed_before_the_download(hub, monkeypatch):
    hub.add(EVAL, {"nq.jsonl": evaluation(200)}, "dataset")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(UserError, match=at("data/prepared/downloads/dynamicrag_nq", 10)):
        prepare("dynamicrag_nq")
    assert hub.downloads("nq.jsonl") == []


def test_a_disk_that_fills_up_keeps_what_was_downloaded(hub, monkeypatch):
    content = os.urandom(20_000)
    change(monkeypatch, "psgs_w100", url=hub.serve("c.tsv.gz", content))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=at("psgs_w100.tsv.gz")):
            prepare("psgs_w100")
    prepare("psgs_w100")
    assert len(hub.downloads("c.tsv.gz")) == 1 and Path("data/prepared/psgs_w100.tsv.gz").read_bytes() == content


def test_without_a_network_the_first_set_ends_the_run(hub):
    hub.stop()
    with pytest.raises(UserError, match=at(TRAINING, "HF_ENDPOINT")):
        prepare("dynamicrag")


def test_a_server_that_cannot_be_reached_keeps_nothing_from_the_others(hub, monkeypatch, capsys, caplog):
    hub.add(FLASHRAG, {"nq/test.jsonl": flashrag(3), "retrieval-corpus/wiki18_100w.zip": packed({"wiki18_100w.jsonl": WIKI18})}, "dataset")
    hub.add("Qwen/Qwen3-8B", {"config.json": b"{}", "model.safetensors": b"w"})
    for name in ("psgs_w100", "contriever_embeddings"):
        change(monkeypatch, name, url="http://127.0.0.1:9/file")
    asked = ["flashrag_nq", "corpora", "Qwen3-8B"]
    shown = forecast(capsys, *asked)
    assert shown["flashrag_nq"][1] == f"{len(flashrag(3))} bytes" and shown["Qwen3-8B"][1] == "3 bytes" and names(shown["psgs_w100"][5], "http://127.0.0.1:9/file")
    with pytest.raises(UserError, match=at("--name", 2, 5, "psgs_w100", "contriever_embeddings")):
        prepare(*asked)
    assert Path("data/prepared/wiki18_100w.jsonl").exists() and Path("models/Qwen3-8B/config.json").exists()
    assert logged(caplog, "http://127.0.0.1:9/file", level="ERROR") == 1, "asked once"


@pytest.mark.parametrize("name", ["flashrag_nq", "wiki18_100w", "Qwen3-8B"])
def test_a_folder_that_cannot_be_made_is_named_before_the_download(hub, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=at("file")):
        prepare(name, "--output_dir", "file", "--models_dir", "file")
    assert hub.requests == []


@pytest.mark.parametrize("why", ["offline", "no network"])
def test_the_cache_of_the_hub_serves_without_a_network(hub, monkeypatch, tmp_path, why):
    hub.add(EVAL, {"nq.jsonl": evaluation(3)}, "dataset")
    hub.add("facebook/contriever-msmarco", {"config.json": b"{}", "pytorch_model.bin": b"w" * 50})
    huggingface_hub.snapshot_download(EVAL, repo_type="dataset")
    huggingface_hub.snapshot_download("facebook/contriever-msmarco")
    if why == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.stop()
    prepare("dynamicrag_nq", "contriever-msmarco")
    assert len(read_jsonl(tmp_path / "data/prepared/dynamicrag_nq.jsonl")) == 3
    assert Path("models/contriever-msmarco/pytorch_model.bin").read_bytes() == b"w" * 50
    with pytest.raises(UserError, match=at(TRAINING, "HF_HUB_OFFLINE=1" if why == "offline" else "HF_ENDPOINT")):
        prepare("dynamicrag_training")


@pytest.mark.parametrize("fails", ["at once", "on the way"])
def test_rows_that_are_to_be_made_again_stay_if_the_hub_does_not_deliver(hub, monkeypatch, fails):
    hub.add(EVAL, {"nq.jsonl": evaluation(3)}, "dataset")
    prepare("dynamicrag_nq")
    before = {path: path.read_bytes() for path in Path("data/prepared").glob("dynamicrag_nq*")}
    if fails == "at once":
        hub.stop()
    else:
        monkeypatch.setattr(downloads, "ATTEMPTS", 1)
        hub.interrupt("nq.jsonl", after=0)
    with pytest.raises(UserError, match=at(EVAL)):
        prepare("dynamicrag_nq", "--overwrite")
    assert {path: path.read_bytes() for path in Path("data/prepared").glob("dynamicrag_nq*")} == before and len(before) == 2


def test_a_file_in_the_cache_is_not_downloaded_again(hub):
    hub.add(EVAL, {"nq.jsonl": evaluation(3)}, "dataset")
    huggingface_hub.snapshot_download(EVAL, repo_type="dataset")
    hub.requests.clear()
    prepare("dynamicrag_nq")
    assert hub.downloads("nq.jsonl") == []


def test_a_file_of_the_user_is_not_overwritten(hub, monkeypatch):
    content = os.urandom(500)
    change(monkeypatch, "psgs_w100", url=hub.serve("c.tsv.gz", content))
    Path("data/prepared").mkdir(parents=True)
    mine = Path("data/prepared/psgs_w100.tsv.gz")
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=at("psgs_w100.tsv.gz", "--overwrite")):
        prepare("psgs_w100")
    assert mine.read_bytes() == b"mine"
    mine.write_bytes(content)  # the file itself, fetched by other means, is taken
    prepare("psgs_w100")
    assert hub.downloads("c.tsv.gz") == [] and Path(f"{mine}.manifest.json").exists()


def test_names_that_lead_out_of_their_folder_are_not_written(hub, tmp_path):
    hub.add("Qwen/Qwen3-8B", {"config.json": b"{}", "../../evil.json": b"{}", "model.safetensors": b"w"})
    prepare("Qwen3-8B")
    assert written(Path("models")) == ["Qwen3-8B.manifest.json", "config.json", "model.safetensors"]


# ---------------------------------------------------------------- models, corpora, embeddings


def test_a_model_folder_holds_its_weights_once_and_no_code(hub):
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    hub.add("mistralai/Mistral-7B-v0.3", {"model.safetensors.index.json": index, **dict.fromkeys([
        "config.json", "tokenizer.json", "tokenizer.model", "model-00001-of-00001.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "consolidated.safetensors", "onnx/config.json", "original/params.json", "modeling.py", "README.md", "1_Pooling/config.json",
    ], b"{}")})
    prepare("Mistral-7B-v0.3")
    kept = ["config.json", "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    assert written(Path("models/Mistral-7B-v0.3")) == kept and Path("models/Mistral-7B-v0.3/1_Pooling/config.json").exists()
    hub.add("castorini/monot5-base-msmarco", {"config.json": b"{}", "README.md": b"x"})
    with pytest.raises(UserError, match=at("castorini/monot5-base-msmarco")):
        prepare("monot5-base-msmarco")


def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_model(hub, monkeypatch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    hub.add("Qwen/Qwen3-8B", {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b"1", "model-2.safetensors": b"2"})
    for name in ("config.json", "model.safetensors.index.json", "model-1.safetensors"):
        huggingface_hub.hf_hub_download("Qwen/Qwen3-8B", name)
    with monkeypatch.context() as context:
        context.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=at("models/Qwen3-8B", "model-2.safetensors")):
            prepare("Qwen3-8B")
    assert not Path("models/Qwen3-8B.manifest.json").exists()
    prepare("Qwen3-8B")
    assert Path("models/Qwen3-8B/model-2.safetensors").read_bytes() == b"2"


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


WIKI18 = lines([{"id": str(n), "contents": f'"Aaron {n}"\nAaron is a prophet {n}.'} for n in range(50)])
SHARDS = {
    f"wikipedia_embeddings/passages_0{n}": pickle.dumps(([str(4 * n + i) for i in range(4)], np.full((4, 3), n, dtype=np.float16)), protocol=4)
    for n in range(2)
}


def test_a_plain_address_never_sees_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add(EVAL, {"nq.jsonl": evaluation(2)}, "dataset")
    change(monkeypatch, "psgs_w100", url=hub.serve("c.tsv.gz", gzip.compress(b"id\ttext\ttitle\n1\tx\tt\n")))
    for flags in (["--dry_run"], ["--limit", "1"], ["--overwrite"]):
        prepare("psgs_w100", "dynamicrag_nq", *flags)
    assert {(request.path.startswith("/plain/"), request.authorized) for request in hub.requests} == {(True, False), (False, True)}


@pytest.mark.parametrize("limit", [[], ["--limit", "20"]])
def test_corpora_become_what_the_search_reads(hub, monkeypatch, limit):
    table = b"id\ttext\ttitle\n" + b"".join(f'{n}\t"the ""{n}"" text"\ttitle {n}\n'.encode() for n in range(50))
    change(monkeypatch, "psgs_w100", url=hub.serve("psgs_w100.tsv.gz", gzip.compress(table, mtime=0)))
    hub.add(FLASHRAG, {"retrieval-corpus/wiki18_100w.zip": packed({"wiki18_100w.jsonl": WIKI18, "__MACOSX/._wiki18_100w.jsonl": b"x"})}, "dataset")
    prepare("psgs_w100", "wiki18_100w", *limit)
    dpr, wiki = (list(read_passages(f"data/prepared/{name}")) for name in ("psgs_w100.tsv.gz", "wiki18_100w.jsonl"))
    assert len(dpr) == len(wiki) == (20 if limit else 50)
    assert dpr[2] == ("2", "title 2", 'the "2" text') and wiki[3] == ("3", "Aaron 3", "Aaron is a prophet 3.")


def test_published_embeddings_become_shards(hub, monkeypatch):
    change(monkeypatch, "contriever_embeddings", url=hub.serve("e.tar", tarred(SHARDS)))
    prepare("contriever_embeddings")
    shards = open_shards(find_shards("data/prepared/contriever_embeddings/*"))
    assert [shard.ids.tolist() for shard in shards] == [[b"0", b"1", b"2", b"3"], [b"4", b"5", b"6", b"7"]] and shards[1].vectors[0, 0] == 1
    manifest = json.loads(Path("data/prepared/contriever_embeddings.manifest.json").read_bytes())
    assert manifest["sha256"] == {"e.tar": hashlib.sha256(tarred(SHARDS)).hexdigest()}


@pytest.mark.parametrize(
    "content", [b"no archive", packed({"a.jsonl": b"{}", "b.tsv": b""}), packed({"readme.txt": b""})], ids=["no zip", "two", "none"]
)
def test_an_archive_without_one_corpus_is_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match=at("a.zip")):
        unpack_corpus(tmp_path / "a.zip", tmp_path / "out.jsonl", None)
    assert written(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "content", [b"no archive", tarred(SHARDS)[:700], tarred({}), tarred({"a/x": b"1", "b/x": b"2"})], ids=["no tar", "cut", "empty", "one name twice"]
)
def test_a_broken_archive_of_embeddings_leaves_no_folder(hub, monkeypatch, content):
    change(monkeypatch, "contriever_embeddings", url=hub.serve("e.tar", content))
    with pytest.raises(UserError, match=at("e.tar")):
        prepare("contriever_embeddings")
    assert not Path("data/prepared/contriever_embeddings").exists()


def test_an_archive_writes_nothing_outside_its_folder(hub, monkeypatch, tmp_path):
    change(monkeypatch, "contriever_embeddings", url=hub.serve("e.tar", tarred({"../../../up": b"1", "/tmp/dynamicrag_absolute": b"2"})))
    prepare("contriever_embeddings")
    assert written(Path("data/prepared/contriever_embeddings")) == ["dynamicrag_absolute", "up"]
    assert not Path("/tmp/dynamicrag_absolute").exists() and not list(tmp_path.parent.glob("up"))


# ---------------------------------------------------------------- everything at once


@pytest.fixture
def full_hub(hub, monkeypatch):
    """A hub that has every set of the table; a model is a few bytes."""
    repositories: dict[tuple[str, str], dict[str, bytes]] = {}
    for entry in SETS.values():
        if entry.repo:
            files = repositories.setdefault((entry.repo, entry.repo_type), {})
            if entry.kind == "model":
                files |= {"config.json": b"{}", "model.safetensors": b"w" * 10}
            elif entry.kind == "questions":
                files[entry.files[0].replace("*", "l")] = flashrag(30) if entry.group == "flashrag" else evaluation(30)
    repositories[TRAINING, "dataset"] = {"train.jsonl": evaluation(30)}
    repositories[FLASHRAG, "dataset"]["retrieval-corpus/wiki18_100w.zip"] = packed({"wiki18_100w.jsonl": WIKI18})
    for (repo, repo_type), files in repositories.items():
        hub.add(repo, files, repo_type, gated=repo.startswith("meta-llama"))
    change(monkeypatch, "psgs_w100", url=hub.serve("p.tsv.gz", gzip.compress(b"id\ttext\ttitle\n" + b"1\tx\tt\n" * 30)))
    change(monkeypatch, "contriever_embeddings", url=hub.serve("e.tar", tarred(SHARDS)))
    return hub


def test_all_sets_with_a_limit(full_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", full_hub.token)
    prepare("all", "--limit", "20")
    for entry in SETS.values():
        path = entry.path("data/prepared", "models")
        assert path.exists() and Path(f"{path}.manifest.json").is_file(), entry.name
        assert entry.kind != "questions" or len(read_jsonl(path)) == 20


def test_a_dry_run_says_what_a_download_costs_and_writes_nothing(full_hub, capsys):
    prepare("flashrag_nq")
    before = written(Path())
    prepare("all", "--limit", "20", "--dry_run")
    out = capsys.readouterr().out
    shown = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines()[2:] if line.startswith("|")}
    assert shown.keys() == SETS.keys() and written(Path()) == before
    assert shown["flashrag_nq"][2] == "0 bytes" and shown["flashrag_nq"][5] and names(shown["dynamicrag_nq"][5], 20) and shown["dynamicrag_nq"][2] == "a part"
    assert names(shown["wiki18_100w"][5], "--limit") and shown["Qwen3-8B"][1:3] == ["12 bytes", "12 bytes"]
    assert names(shown["Llama-2-7b-hf"][5], "HF_TOKEN") and names(shown["Llama-2-7b-hf"][4], "Llama 2 Community Licence (gated)")
    free = out.splitlines()[-1]
    assert names(free, "data/prepared", "models")


def test_a_dry_run_measures_what_is_there_and_says_what_a_run_would_refuse(full_hub, capsys):
    def told(*flags: str) -> list[list[str]]:
        return [cells[1:4] + cells[5:] for cells in forecast(capsys, "dynamicrag_nq", "Qwen3-8B", *flags).values()]

    prepare("dynamicrag_nq", "Qwen3-8B", "--limit", "20")
    rows = f"{Path('data/prepared/dynamicrag_nq.jsonl').stat().st_size:,} bytes"
    complete = ["12 bytes", "0 bytes", "12 bytes", "complete"]
    assert told("--limit", "20") == [[rows, "0 bytes", rows, "complete"], complete]
    whole, unchanged = told()
    assert whole[:3] == [rows, "0 bytes", rows] and names(whole[3], "limit", "--overwrite") and unchanged == complete
    assert told("--overwrite")[1][:3] == ["12 bytes", "12 bytes", "0 bytes"]


def test_a_dry_run_warns_of_a_disk_that_is_too_small(full_hub, monkeypatch, caplog):
    prepare("Qwen3-8B", "--dry_run")
    assert not caplog.records
    monkeypatch.setattr(prepare_data, "free_space", lambda folder: 11 if folder == Path("models") else 1000)
    prepare("Qwen3-8B", "--dry_run")
    assert names(caplog.messages[-1], "12 bytes", "11 bytes")


def test_a_dry_run_without_a_network_takes_the_sizes_of_the_table(hub, capsys):
    hub.stop()
    prepare("models", "--dry_run")
    out = capsys.readouterr().out
    assert "16.10 GB" in out and out.count("HF_ENDPOINT") == 1


def test_the_script_prepares_what_its_settings_name(hub, tmp_path):
    hub.add(EVAL, {"nq.jsonl": evaluation(30)}, "dataset")
    hub.add("meta-llama/Meta-Llama-3-8B", {"config.json": b"{}", "model.safetensors": b"w"}, gated=True)
    environment = {**os.environ, **hub.environment(tmp_path / "cache"), "PREPARED": str(tmp_path / "p"), "PREPARE": "dynamicrag_nq Meta-Llama-3-8B",
                   "PREPARE_FLAGS": f"--limit 20 --models_dir {tmp_path}/m"}
    del environment["HF_HUB_OFFLINE"]
    done = subprocess.run(["bash", "scripts/00_prepare.sh", "configs/llama3_8b.env"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1 and names(done.stderr, "meta-llama/Meta-Llama-3-8B", "HF_TOKEN")
    assert len(read_jsonl(tmp_path / "p/dynamicrag_nq.jsonl")) == 20


# ---------------------------------------------------------------- shared runs


@pytest.fixture
def retrieved(tmp_path) -> Path:
    """What retriever.py leaves: rows with documents and scores, and a manifest."""
    docs = [[{"id": f"p{4 * n + i}", "title": "t", "text": f"text {n} {i}", "score": 3.0 - i} for i in range(3)] for n in range(4)]
    asked = [{"id": f"nq_{n}", "dataset": "nq", "question": "q?", "answers": ["a"], "docs": docs[n]} for n in range(4)]
    rows = write_jsonl(tmp_path / "retrieval_nq.jsonl", asked)
    arguments = {"passages": "data/psgs_w100.tsv", "model_name_or_path": "facebook/contriever-msmarco", "index": ["flat"], "n_docs": 3, "run": []}
    Path(f"{rows}.manifest.json").write_text(json.dumps({"arguments": arguments, "inputs": {}, "outputs": [str(rows)], "counts": {"rows": 4}}))
    return rows


def export(rows: Path, *flags: str) -> None:
    prepare_data.main(["--export_run", str(rows), "--run_name", "nq_top3", "--output_dir", "shared", *flags])


@pytest.mark.parametrize("place", ["shared", "me/runs"])
def test_a_shared_run_gives_the_same_documents_elsewhere(hub, monkeypatch, retrieved, place):
    export(retrieved)
    said = json.loads(Path("shared/nq_top3/shared_run.json").read_bytes())
    assert (said["corpus"], said["encoder"], said["k"], said["questions"]) == ("data/psgs_w100.tsv", "facebook/contriever-msmarco", 3, 4)
    if place == "me/runs":
        monkeypatch.setenv("HF_TOKEN", hub.token)
        huggingface_hub.create_repo(place, repo_type="dataset")
        huggingface_hub.upload_folder(repo_id=place, folder_path="shared", repo_type="dataset")
        shutil.rmtree("shared")
    prepare_data.main(["--shared_runs", place, "--name", "nq_top3"])
    assert read_jsonl(Path("data/prepared/nq_top3.jsonl")) == read_jsonl(retrieved)
    assert len(Path("data/prepared/nq_top3.trec").read_text().splitlines()) == 12
    manifest = json.loads(Path("data/prepared/nq_top3.jsonl.manifest.json").read_bytes())
    assert manifest["resolved"].keys() == {"version", "corpus", "encoder", "k"} and manifest["resolved"]["k"] == "3"


@pytest.mark.parametrize("file", ["rows.jsonl.gz", "run.trec"])
def test_a_shared_run_with_another_file_is_refused(hub, retrieved, file):
    export(retrieved)
    path = Path("shared/nq_top3") / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=at(file)):
        prepare_data.main(["--shared_runs", "shared", "--name", "nq_top3"])
    path.unlink()
    with pytest.raises(UserError, match=at(file)):
        prepare_data.main(["--shared_runs", "shared", "--name", "nq_top3"])
    assert not Path("data/prepared/nq_top3.jsonl").exists()
    path.write_bytes(content)
    prepare_data.main(["--shared_runs", "shared", "--name", "nq_top3"])
    path.unlink()
    with pytest.raises(UserError, match=at(file)):
        prepare_data.main(["--shared_runs", "shared", "--name", "nq_top3", "--overwrite"])
    assert [name for name in written() if "manifest" not in name] == ["nq_top3.jsonl", "nq_top3.trec"], "what is there stays"


def test_a_run_whose_search_is_not_known_needs_corpus_and_encoder(hub, retrieved):
    Path(f"{retrieved}.manifest.json").unlink()
    with pytest.raises(UserError, match=at("--corpus", retrieved.name)):
        export(retrieved)
    export(retrieved, "--corpus", "wiki18", "--encoder", "e5")
    with pytest.raises(UserError, match=at("nq_top3", "--run_name")):
        export(retrieved, "--corpus", "wiki18", "--encoder", "e5")
