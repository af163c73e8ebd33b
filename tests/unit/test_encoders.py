"""Encoders as their authors ship them: vectors are those of SentenceTransformer.encode, and shards record how they were made."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import at, logged, read_jsonl, write_jsonl
from stubs import WORDS, _bert_config, _bert_tokenizer, make_text

import generate_passage_embeddings
import retriever
from dynamicrag.models.encoder import Encoder, encoder_settings
from dynamicrag.rows.manifest import manifest_path, read_manifest
from dynamicrag.stage import UserError

TEXTS = [make_text(random.Random(number), 1, 60) for number in range(24)] + ["", "river", "river " * 400]
MXBAI_PROMPT, QWEN_PROMPT = "which river country : ", "president court\nQuery:"


def bert(folder: Path) -> None:
    import torch
    from transformers import BertModel

    tokenizer = _bert_tokenizer()
    torch.manual_seed(11)
    BertModel(_bert_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def xlm_roberta(folder: Path) -> None:
    """A model with 66 positions for 64 tokens, as BGE-M3 has 8194 positions for 8192 tokens."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(f"▁{word}" for word in WORDS), "<mask>"]
    tokenizer = XLMRobertaTokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)])
    torch.manual_seed(12)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def qwen3(folder: Path) -> None:
    """A causal model whose tokenizer pads on the left and ends each text with a special token, which is pooled."""
    import torch
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([make_text(random.Random(number)) for number in range(99)], vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    raw._tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="<|end|>", pad_token="<|end|>", padding_side="left")
    torch.manual_seed(13)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, max_position_embeddings=512, initializer_range=0.3,
    )
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# name: model, pooling, modules between, Normalize, tokens, prompts. The settings are those of the models with these names.
FORMS = {
    "bge": (bert, "cls", False, True, 64, {}),
    "bge-m3": (xlm_roberta, "cls", False, True, 64, {}),
    "e5": (bert, "mean", False, True, 64, {}),
    "gte": (bert, "mean", False, True, 96, {}),
    "gtr": (bert, "mean", True, True, 64, {}),
    "mxbai": (bert, "cls", False, False, 64, {"query": MXBAI_PROMPT, "passage": ""}),
    "qwen3-embedding": (qwen3, "lasttoken", False, True, 128, {"query": QWEN_PROMPT, "document": ""}),
}


@pytest.fixture(scope="session")
def shipped(tmp_path_factory) -> dict[str, Path]:
    """Folders of every form, as SentenceTransformer saves them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folders = {}
    for name, (make, pooling, dense, normalize, tokens, prompts) in FORMS.items():
        plain = tmp_path_factory.mktemp(f"plain_{name}")
        make(plain)
        modules = [Transformer(str(plain), max_seq_length=tokens), Pooling(32, pooling)]
        modules += [Dense(32, 16)] * dense + [Normalize()] * normalize
        folders[name] = plain.parent / name
        SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folders[name]), create_model_card=False)
    return folders


@pytest.fixture
def copy(shipped, tmp_path):
    """A copy of a form with changed files. A value replaces a file, and a dictionary changes keys of a file."""

    def make(name: str, **files: object) -> Path:
        folder = shutil.copytree(shipped[name], tmp_path / f"copy_{name}")
        for file, value in files.items():
            path = folder / file.replace("__", "/").replace("_json", ".json")
            if value and isinstance(value, dict) and path.exists():
                value = {**json.loads(path.read_text()), **value}
            path.write_text(json.dumps(value))
        return folder

    return make


def reference(folder: Path, texts: list[str], role: str, **more: str) -> np.ndarray:
    """The library's vectors of the texts, encoded one at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    encode = model.encode_query if role == "query" else model.encode_document
    return np.stack([encode([text], show_progress_bar=False, **more)[0] for text in texts])


def assert_same_directions(vectors: np.ndarray, expected: np.ndarray) -> None:
    cosine = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


@pytest.mark.parametrize("role", ["query", "passage"])
@pytest.mark.parametrize("name", FORMS)
def test_vectors_are_those_of_sentence_transformers(shipped, name, role):
    """The texts have different lengths and are padded in the project's batches."""
    encoder = Encoder(str(shipped[name]), "cpu", "float32", role=role)
    vectors = encoder.encode(TEXTS, batch_tokens=300)
    assert encoder.seen_tokens < encoder.padded_tokens, "there is padding to be ignored"
    expected = reference(shipped[name], TEXTS, role)
    assert vectors.shape == expected.shape
    assert_same_directions(vectors, expected)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)  # mxbai's vectors too, since its folder compares by the cosine
    np.testing.assert_allclose(Encoder(str(shipped[name]), "cpu", "float32", role=role).encode(TEXTS, batch_tokens=1), vectors, atol=1e-5)


@pytest.mark.parametrize(("name", "query", "passage"), [("mxbai", MXBAI_PROMPT, ""), ("qwen3-embedding", QWEN_PROMPT, ""), ("bge", "", "")])
def test_prompts_are_the_folders(shipped, name, query, passage):
    assert [encoder_settings(str(shipped[name]), role)[0].prompt for role in ("query", "passage")] == [query, passage]


@pytest.mark.parametrize(("config", "query", "passage"), [
    ({"prompts": {"query": "q: ", "passage": "p: "}}, "q: ", "p: "), ({"prompts": {"query": "q: ", "document": "d: ", "passage": "p: "}}, "q: ", "d: "),
    ({"prompts": {"s2p": "s: "}, "default_prompt_name": "s2p"}, "s: ", "s: "), ({"prompts": {"s2p": "s: "}}, "", ""),
    ({"prompts": {"query": "q: "}, "default_prompt_name": "query"}, "q: ", ""), ({"prompts": None}, "", ""),
])
def test_each_name_of_a_prompt(copy, config, query, passage):
    folder = copy("bge", config_sentence_transformers_json={"default_prompt_name": None, **config})
    assert [encoder_settings(str(folder), role)[0].prompt for role in ("query", "passage")] == [query, passage]
    assert encoder_settings(str(folder), "query", prompt="own ")[0].prompt == "own "


def test_a_prompt_by_flag(shipped):
    """The prompts of E5 are only in the README of its authors."""
    vectors = Encoder(str(shipped["e5"]), "cpu", "float32", prompt="which river : ", role="query").encode(TEXTS)
    assert_same_directions(vectors, reference(shipped["e5"], TEXTS, "query", prompt="which river : "))


def test_a_plain_folder_may_have_prompts(tmp_path, encoder_dir):
    """This is for settings files, whose lists of flags cannot hold a space."""
    folder = shutil.copytree(encoder_dir, tmp_path / "m")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "which river : ", "passage": "oil : "}, "similarity_fn_name": "cosine"}))
    prompts = [encoder_settings(str(folder), role)[0] for role in ("query", "passage")]
    assert [(one.prompt, one.pooling, one.normalize) for one in prompts] == [("which river : ", "mean", False), ("oil : ", "mean", False)]
    for wrong in ("[]", "{", json.dumps({"prompts": [1]}), json.dumps({"prompts": {"query": 1}}), json.dumps({"truncate_dim": "8"})):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"config_sentence_transformers\.json"):
            encoder_settings(str(folder), "query")


def test_a_pooling_without_the_prompt(copy):
    folder = copy("mxbai", **{"1_Pooling__config_json": {"include_prompt": False, "pooling_mode": "mean"}})
    texts = TEXTS[:10]
    assert_same_directions(Encoder(str(folder), "cpu", "float32", role="query").encode(texts), reference(folder, texts, "query"))


def test_vectors_that_are_truncated(copy):
    folder = copy("bge", config_sentence_transformers_json={"truncate_dim": 8})
    vectors = Encoder(str(folder), "cpu", "float32").encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 8)
    assert_same_directions(vectors, reference(folder, TEXTS, "passage"))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_plain_folder_is_pooled_by_the_flag(encoder_dir, pooling):
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder_dir).eval(), AutoTokenizer.from_pretrained(encoder_dir)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=128)).last_hidden_state[0] for text in TEXTS]
    expected = {"mean": [state.mean(0) for state in states], "cls": [state[0] for state in states], "lasttoken": [state[-1] for state in states]}
    np.testing.assert_allclose(Encoder(str(encoder_dir), "cpu", "float32", pooling=pooling).encode(TEXTS), np.stack(expected[pooling]), atol=1e-5)


@pytest.mark.parametrize(("name", "flag", "length"), [
    ("bge", None, 64), ("gte", None, 96), ("bge", 20, 20), ("bge", 500, 128), ("bge-m3", None, 64), ("bge-m3", 500, 64), ("qwen3-embedding", None, 128),
])
def test_the_maximum_length_is_the_folders(shipped, name, flag, length):
    encoder = Encoder(str(shipped[name]), "cpu", "float32", flag)
    assert encoder.max_length == length == max(map(len, encoder.tokenize(["river " * 600])))
    assert np.isfinite(encoder.encode(["river " * 600])).all()


@pytest.mark.parametrize(("similarity", "flag", "normalize", "warnings"), [
    ("cosine", False, True, 0), ("dot", False, False, 0), ("dot", True, True, 1), (None, False, False, 1), (None, True, True, 1),
])
def test_normalisation_without_a_normalize_module(copy, caplog, similarity, flag, normalize, warnings):
    folder = copy("mxbai", config_sentence_transformers_json={"similarity_fn_name": similarity})
    encoder = Encoder(str(folder), "cpu", "float32", normalize=flag)
    assert encoder.settings.normalize == normalize
    assert np.allclose(np.linalg.norm(encoder.encode(["river"]), axis=1), 1, atol=1e-5) == normalize
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == warnings


# ---------------------------------------------------------------- what is refused


def modules(*kinds: str, path: str = "") -> list[dict]:
    return [{"idx": n, "name": str(n), "path": path if n else "", "type": kind} for n, kind in enumerate(kinds)]


TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"


@pytest.mark.parametrize("listed", [
    modules("custom.Transformer", POOLING, path="1_Pooling"), modules(TRANSFORMER, "custom.Pooling", path="1_Pooling"),
    modules(TRANSFORMER, "os.Pooling"), modules("sentence_transformers.models.Router"), modules(TRANSFORMER, "sentence_transformers.util.Router"),
    modules(TRANSFORMER, POOLING, path="../elsewhere"), modules(TRANSFORMER, POOLING, path="1_Pooling/../../elsewhere"), modules(TRANSFORMER), [], {}, [1], modules(),
    modules(TRANSFORMER, "sentence_transformers.models.Normalize", POOLING, path="1_Pooling"), [{"type": None}], modules(TRANSFORMER, POOLING, path="nowhere"),
])
def test_other_modules_are_refused(copy, listed, tmp_path, monkeypatch):
    """The error has one line, and no code of the model runs, even if it could be imported."""
    folder = copy("bge", modules_json=listed)
    shutil.copytree(folder / "1_Pooling", tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(folder)
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Transformer: pass\nclass Pooling: pass\n")
    with pytest.raises(UserError, match="copy_bge") as error:
        Encoder(str(folder), "cpu", "float32")
    assert not (tmp_path / "canary").exists() and "\n" not in str(error.value)


def test_trust_in_a_configuration_is_no_trust(copy, tmp_path):
    folder = copy("bge", sentence_bert_config_json={"model_args": {"trust_remote_code": True}, "config_args": {"trust_remote_code": True}})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other", "auto_map": {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}}))
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(UserError, match="copy_bge"):
        Encoder(str(folder), "cpu", "float32")
    assert not (tmp_path / "canary").exists()


def test_an_activation_that_is_not_torchs_is_refused(copy):
    folder = copy("gtr", **{"2_Dense__config_json": {"activation_function": "custom.Activation"}})
    with pytest.raises(UserError, match=r"2_Dense/config\.json"):
        Encoder(str(folder), "cpu", "float32")


@pytest.mark.parametrize("part", ["encoder.layer.1.", "linear."])
def test_weights_that_are_missing_are_refused(copy, part):
    import safetensors.torch

    folder = copy("gtr")
    path = folder / ("model.safetensors" if part.startswith("encoder") else "2_Dense/model.safetensors")
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: value for name, value in weights.items() if not name.startswith(part)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="copy_gtr"):
        Encoder(str(folder), "cpu", "float32")


def test_a_pooling_flag_against_the_folder_is_refused(shipped):
    assert Encoder(str(shipped["bge"]), "cpu", "float32", pooling="cls").settings.pooling == "cls"
    with pytest.raises(UserError, match="--pooling mean"):
        Encoder(str(shipped["bge"]), "cpu", "float32", pooling="mean")


# ---------------------------------------------------------------- shards remember


def embed(model, passages, folder, *flags):
    generate_passage_embeddings.main([
        "--model_name_or_path", str(model), "--passages", str(passages), "--output_dir", str(folder), "--dtype", "float32", "--device", "cpu", *flags,
    ])


def search(model, passages, folder, output, *flags):
    query = write_jsonl(output.with_suffix(".queries"), [{"id": "a", "question": "river mountain"}])
    retriever.main([
        "--model_name_or_path", str(model), "--passages", str(passages), "--passages_embeddings", f"{folder}/*.npy", "--query", str(query),
        "--output_file", str(output), "--dtype", "float32", "--device", "cpu", "--n_docs", "120", *flags,
    ])
    return read_jsonl(output)[0]["docs"]


def test_scores_are_those_of_the_library(tmp_path, shipped, corpus, corpus_tsv, caplog):
    """Both stages run with a prompt for questions, another one for passages, and the vector of the last token."""
    folder = shipped["qwen3-embedding"]
    caplog.set_level(logging.INFO)
    embed(folder, corpus_tsv, tmp_path / "e", "--passage_prompt", "oil : ")
    docs = search(folder, corpus_tsv, tmp_path / "e", tmp_path / "o.jsonl")
    passages = reference(folder, [f"{passage['title']} {passage['text']}" for passage in corpus], "passage", prompt="oil : ")
    scores = dict(zip((passage["id"] for passage in corpus), passages @ reference(folder, ["river mountain"], "query")[0], strict=True))
    assert len(docs) == 120 and all(abs(doc["score"] - scores[doc["id"]]) < 2e-3 for doc in docs)
    made = read_manifest(tmp_path / "e" / "passages_00.npy")["summary"]["encoder"]
    assert made == {"pooling": "lasttoken", "layers": [], "normalize": True, "prompt": "oil : ", "width": 32, "max_length": 128}
    assert [logged(caplog, folder, 128, repr(prompt), level="INFO") for prompt in ("oil : ", QWEN_PROMPT)] == [1, 1], "when embedding and when searching"


@pytest.mark.parametrize(("embedded", "searched", "named"), [
    (["--pooling", "cls"], [], ("'cls'", "'mean'")), ([], ["--pooling", "lasttoken"], ("'mean'", "'lasttoken'")),
    (["--normalize"], [], ("True", "False")), ([], ["--normalize"], ("False", "True")),
])
def test_a_search_with_other_settings_is_refused(tmp_path, encoder_dir, corpus_tsv, embedded, searched, named):
    embed(encoder_dir, corpus_tsv, tmp_path / "e", *embedded)
    with pytest.raises(UserError, match=at("passages_00.npy", *named)):
        search(encoder_dir, corpus_tsv, tmp_path / "e", tmp_path / "o.jsonl", *searched)
    assert not (tmp_path / "o.jsonl.partial").exists(), "refused before the search"
    assert len(search(encoder_dir, corpus_tsv, tmp_path / "e", tmp_path / "o.jsonl", *embedded)) == 120


def test_shards_of_two_prompts_are_refused_and_a_missing_prompt_is_warned_of(tmp_path, encoder_dir, corpus_tsv, caplog):
    for shard in "01":
        embed(encoder_dir, corpus_tsv, tmp_path / "e", "--shard_id", shard, "--num_shards", "2", "--passage_prompt", f"passage {shard}: ")
    with pytest.raises(UserError, match="'passage 0: '"):
        search(encoder_dir, corpus_tsv, tmp_path / "e", tmp_path / "o.jsonl")
    embed(encoder_dir, corpus_tsv, tmp_path / "e5", "--passage_prompt", "passage: ")
    search(encoder_dir, corpus_tsv, tmp_path / "e5", tmp_path / "a.jsonl", "--query_prompt", "query: ")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    search(encoder_dir, corpus_tsv, tmp_path / "e5", tmp_path / "b.jsonl")
    assert [record.args[1] for record in caplog.records if record.levelno == logging.WARNING] == ["passage: "]


def test_shards_without_a_record(tmp_path, encoder_dir, shipped, corpus_tsv, shards_dir, caplog):
    """Published shards are accepted, with a line in the log. Shards of an earlier version were pooled by the mean, even if the folder has another setting."""
    embed(encoder_dir, corpus_tsv, tmp_path / "e")
    path = manifest_path(tmp_path / "e" / "passages_00.npy")
    made = json.loads(path.read_text())
    made.pop("summary")
    path.write_text(json.dumps(made))
    caplog.set_level(logging.INFO)
    caplog.clear()
    assert len(search(encoder_dir, corpus_tsv, tmp_path / "e", tmp_path / "a.jsonl")) == 120
    with pytest.raises(UserError, match=at("passages_00.npy", "pooling", "'mean'", "'cls'")):
        search(shipped["bge"], corpus_tsv, tmp_path / "e", tmp_path / "b.jsonl")
    path.write_text(json.dumps({**made, "summary": {"encoder": 1}}))
    with pytest.raises(UserError, match=at("passages_00.npy.manifest.json")):
        search(encoder_dir, corpus_tsv, tmp_path / "e", tmp_path / "b.jsonl")
    assert not logged(caplog, "passages_00.npy", level="INFO")
    path.unlink()
    assert len(search(shipped["bge"], corpus_tsv, tmp_path / "e", tmp_path / "c.jsonl")) == 120
    assert logged(caplog, "passages_00.npy", level="INFO") == 1
