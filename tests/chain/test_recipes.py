"""scripts/recipes.py: the recipes and settings files of the repository are what it writes from the facts about each model."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import at, logged
from stages import REPO

from dynamicrag.files.published import published
from dynamicrag.stage import UserError

MODELS = sorted(path.stem for path in (REPO / "recipes/models").glob("*.yaml"))
TYPES = {"llama2_7b": "llama", "llama3_8b": "llama", "llama31_8b": "llama", "mistral_7b": "mistral", "qwen25_7b": "qwen2", "qwen3_8b": "qwen3"}
KEPT = ("configs/llama3_8b.env", "configs/llama2_7b.env")  # settings files that were there before


@pytest.fixture
def recipes(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(REPO / "scripts")
    import recipes

    return recipes


@pytest.fixture
def most(recipes) -> dict[int, float]:
    """GiB that a recipe may need, by the card it is for."""
    import training_memory

    return {card: training_memory.MOST * room for card, room in recipes.ROOM.items()}


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the facts of all models, and nothing made from them."""
    (tmp_path / "recipes/models").mkdir(parents=True)
    (tmp_path / "recipes/dataset_info.json").write_text("{}")
    for model in MODELS:
        (tmp_path / f"recipes/models/{model}.yaml").write_bytes((REPO / f"recipes/models/{model}.yaml").read_bytes())
    return tmp_path


def test_the_recipes_and_settings_here_are_what_the_script_writes(recipes, project):
    recipes.main(["--project_dir", str(project)])
    written = {str(path.relative_to(project)): path.read_text(encoding="utf-8") for path in project.rglob("*.*") if path.is_file() and "models" not in path.parts}
    info = json.loads(written.pop("recipes/dataset_info.json"))
    assert len(written) == len(MODELS) * (len(recipes.KINDS) + 1)
    for name, text in written.items():
        if name not in KEPT:
            assert (REPO / name).read_text(encoding="utf-8") == text, f"{name}: run python scripts/recipes.py"
    ours = (REPO / "recipes/dataset_info.json").read_text(encoding="utf-8")
    assert info.items() <= json.loads(ours).items() and recipes.info_text(json.loads(ours)) == ours


def test_a_settings_file_that_is_there_is_kept_and_so_are_other_data_sets(recipes, project):
    (project / "configs").mkdir()
    (project / "configs/qwen3_8b.env").write_text("MINE=1\n")
    (project / "recipes/dataset_info.json").write_text('{"mine": {"file_name": "x.json"}}')
    recipes.main(["qwen3_8b", "--project_dir", str(project)])
    assert (project / "configs/qwen3_8b.env").read_text() == "MINE=1\n"
    made = [f"qwen3_8b_{role}_{kind}" for kind in ("dpo", "best_of_n", "kto") for role in ("reranker", "generator")]
    assert list(json.loads((project / "recipes/dataset_info.json").read_text())) == ["mine", *made]
    assert {path.name for path in (project / "recipes").iterdir()} == {"models", "qwen3_8b", "dataset_info.json"}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_ten_lines_and_its_parameters_are_those_that_transformers_counts(recipes, model):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = REPO / f"recipes/models/{model}.yaml"
    shape, facts = recipes.read_model(path).shape, yaml.safe_load(path.read_text())
    assert len(path.read_text().splitlines()) <= 10
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(TYPES[model], **facts["shape"], tie_word_embeddings=False))
    linear = [module.weight.shape for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    assert sum(rows * columns for rows, columns in linear) == shape.linear
    assert sum(recipes.RANK * (rows + columns) for rows, columns in linear) == shape.adapter
    counted = sum(weights.numel() for weights in whole.parameters())
    assert shape.linear + shape.embedding == pytest.approx(counted, rel=2e-4)


def test_memory_is_that_of_the_figures_in_the_recipes(recipes):
    """Worked out by hand for LLaMA3-8B, 8.03e9 parameters of which 1.05e9 are embeddings; DPO's logits as measured in docs/scale.md."""
    shape = recipes.read_model(REPO / "recipes/models/llama3_8b.yaml").shape
    sizes = [round(size, 1) for _, size in recipes.memory_of(shape, "dpo", 8192)]
    assert sizes == [15.0, 1.9, 2.0, 4.0, 39.1, 1.0]  # 16 and 2 bytes x 8.03e9 / 8, 2 x 1.05e9, 2 x 2 x 8192 x 32 x 4096, 20 x 2 x 8192 x 128,256
    sizes = [round(size, 1) for _, size in recipes.memory_of(shape, "sft_qlora", 4096)]
    assert sizes == [5.3, 0.6, 1.0, 5.9, 1.0]  # 0.516 x 6.98e9 + 2 x 1.05e9, 16 x 41.9e6, 2 x 4096 x 32 x 4096, 12 x 4096 x 128,256
    assert recipes.total_of(shape, "kto", 8192) == recipes.total_of(shape, "dpo", 8192), "two rows at a time, and a reference"
    assert recipes.total_of(shape, "best_of_n", 8192) == recipes.total_of(shape, "sft", 8192)
    assert recipes.total_of(shape, "simpo", 8192) < recipes.total_of(shape, "dpo", 8192) < recipes.total_of(shape, "dpo", 8192, 4)


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_fits_its_card_at_its_window_and_not_at_a_larger_one(recipes, most, model):
    facts = recipes.read_model(REPO / f"recipes/models/{model}.yaml")
    for recipe, kind in recipes.KINDS.items():
        text = (REPO / f"recipes/{model}/{recipe}.yaml").read_text()
        tokens = yaml.safe_load(text)["cutoff_len"]
        assert recipes.total_of(facts.shape, recipe, tokens) <= most[kind.card]
        assert tokens == facts.window or recipes.total_of(facts.shape, recipe, facts.window) > most[kind.card]
        stated = [float(size) for size in re.findall(r"^#\s+(\d+\.\d)  ", text, re.MULTILINE)]
        assert sum(stated) == pytest.approx(recipes.total_of(facts.shape, recipe, tokens), abs=0.5)


def test_the_page_says_what_the_recipes_say(recipes):
    """The table of models in docs/pipeline.md: GiB of each recipe, and its window if that is smaller than the model's."""
    page = (REPO / "docs/pipeline.md").read_text(encoding="utf-8")
    for model in MODELS:
        facts = recipes.read_model(REPO / f"recipes/models/{model}.yaml")

        def figure(recipe: str, facts=facts) -> str:
            tokens = recipes.window_of(facts.shape, recipe, facts.window)
            return f"{recipes.total_of(facts.shape, recipe, tokens):.0f}" + (f" ({tokens})" if tokens < facts.window else "")

        cells = [f"`{model}`", f"`{facts.hub}`", f"`{facts.template}`", str(facts.window), *(
            f"{figure(f'sft{how}')}, {figure(f'dpo{how}')}" for how in ("", "_lora", "_qlora"))]
        assert f"| {' | '.join(cells)} |" in page


def test_a_recipe_that_fits_no_card_is_left_out_and_named(recipes, project, caplog):
    path = project / "recipes/models/llama3_8b.yaml"
    recipes.main(["llama3_8b", "--project_dir", str(project)])
    path.write_text(path.read_text().replace("num_hidden_layers: 32", "num_hidden_layers: 320"))
    recipes.main(["llama3_8b", "--project_dir", str(project)])
    assert list((project / "recipes/llama3_8b").iterdir()) == [] and logged(caplog, "recipes/llama3_8b/sft.yaml") == 1


@pytest.mark.parametrize(("old", "new", "key"), [
    ("hub: meta", "hup: meta", "hub"), ("window: 8192", "window: many", "window"), ("window: 8192", "window: 0", "window"), ("vocab_size", "vocabulary", "shape.vocab_size"),
    ("num_key_value_heads: 8", "num_key_value_heads: 8, mine: 1", "shape.mine"), ("window: 8192", "window: 8192\nmine: 1", "mine"),
    ("  {vocab_size", "  # {vocab_size", "shape"), ("hub:", "- ", "YAML"),
])
def test_a_wrong_fact_is_named(recipes, project, old, new, key):
    path = project / "recipes/models/llama3_8b.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=at(path.name, key)):
        recipes.main(["llama3_8b", "--project_dir", str(project)])
    with pytest.raises(UserError, match=at("none.yaml")):
        recipes.main(["none", "--project_dir", str(project)])


def test_the_settings_of_a_model_name_its_facts_and_give_every_other_setting():
    """A settings file of a model takes all that it does not name from that of LLaMA3-8B."""
    names = re.findall(r"^(\w+)=", (REPO / "configs/llama3_8b.env").read_text(), re.MULTILINE)
    script = "set -eu; source configs/$1.env; for name in " + " ".join(names) + "; do echo \"$name=${!name-}\"; done"
    kept = {name: value for name, value in os.environ.items() if name not in names}

    def settings(model: str) -> dict[str, str]:
        done = subprocess.run(["bash", "-c", script, "settings", model], cwd=REPO, env=kept, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    published = settings("llama3_8b")
    for model in MODELS:
        facts, given = yaml.safe_load((REPO / f"recipes/models/{model}.yaml").read_text()), settings(model)
        assert (given["MODEL"], given["BASE_MODEL"], given["TEMPLATE"]) == (model, facts["hub"], f"template/{facts['template']}.jinja")
        assert (REPO / given["TEMPLATE"]).is_file() and int(given["N_DOCS_SHOWN"]) * 8192 == 40 * facts["window"]
        of_the_model = ("MODEL", "BASE_MODEL", "TEMPLATE", "N_DOCS_SHOWN", "ENGINE_FLAGS")
        assert {name: value for name, value in given.items() if name not in of_the_model} == {name: value for name, value in published.items() if name not in of_the_model}


def test_every_base_model_can_be_prepared_by_name():
    hubs = {yaml.safe_load((REPO / f"recipes/models/{model}.yaml").read_text())["hub"] for model in MODELS}
    assert hubs <= {entry.repo for entry in published().values()}
