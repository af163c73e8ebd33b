"""The README is checked by doing: its commands parse, its files exist, its first two blocks are demo and tests."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_chain import readme_commands

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


def test_first_two_blocks_are_the_demo_and_the_tests():
    blocks = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == ["bash scripts/demo.sh", "bash scripts/test.sh"]


EVERY_LINE = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", [line for line in EVERY_LINE if re.match(r"python \w+\.py ", line)])
def test_command_is_understood_by_its_own_parser(command):
    _, script, *arguments = shlex.split(command)
    importlib.import_module(Path(script).stem).parse_args(arguments)


def test_every_stage_script_has_a_command():
    shown = {shlex.split(command)[1] for command in readme_commands() if command.startswith("python ")}
    assert shown == {script.name for script in REPO.glob("*.py")}


def test_every_file_named_exists():
    named = set(re.findall(r"(?:scripts|experiments|recipes|configs|template|docs|dynamicrag|examples)/[\w/.-]*\w\.(?:sh|yaml|env|jinja|svg|py|md|json)", README))
    named |= {f"recipes/{path}" for path in re.findall(r"llamafactory-cli train recipes/(\S+)", README)}
    assert named
    assert not [path for path in named if not (REPO / path).exists()]


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z_-]+)", README)) - {"--help"}))
def test_every_flag_mentioned_exists_somewhere(flag):
    sources = "".join(path.read_text(encoding="utf-8") for path in [*REPO.glob("*.py"), *(REPO / "dynamicrag").rglob("*.py"), *REPO.glob("examples/factbook/*.py")])
    name = flag.removeprefix("--").replace("-", "_").replace("_", "[-_]")
    assert re.search(f'"--{name}"', sources)


@pytest.mark.parametrize("stage", sorted(path.name for path in REPO.glob("*.py")))
def test_docstring_command_is_understood(stage):
    """The one command in a stage's docstring runs as printed."""
    module = importlib.import_module(Path(stage).stem)
    command = re.search(rf"^    python {stage}.*?(?=^\S|\Z|\n\n)", module.__doc__, re.DOTALL | re.MULTILINE)
    assert command, "no command in the docstring"
    module.parse_args(shlex.split(command[0].replace("\\\n", " "))[2:])


@pytest.mark.parametrize("command", re.findall(r"^python (examples/\S+ .*)$", README, re.MULTILINE))
def test_example_command_is_understood_by_its_own_parser(command, monkeypatch):
    script, *arguments = shlex.split(command)
    monkeypatch.syspath_prepend(REPO / Path(script).parent)
    importlib.import_module(Path(script).stem).parse_args(arguments)


def test_readme_defaults_and_settings_show_the_same_number_of_documents():
    """One number for a window: the stages' defaults, what README says, and the settings of each model's window."""
    defaults = {importlib.import_module(stage).parse_args([]).n_docs for stage in ("process_training_data",)}
    defaults |= {importlib.import_module(stage).parse_args([]).topn for stage in ("sampling_dpo_trajectories", "inference")}
    [shown] = defaults
    assert re.search(rf"\b{shown} documents\b", README) and not [command for command in readme_commands() if "--n_docs 20" in command]
    windows = {"llama3_8b": (shown, 8192), "llama2_7b": (shown // 2, 4096)}
    for model, (number, window) in windows.items():
        settings = (REPO / f"configs/{model}.env").read_text(encoding="utf-8")
        assert f"N_DOCS_SHOWN:-{number}}}" in settings
        assert f"cutoff_len: {window}" in (REPO / f"recipes/{model}/sft.yaml").read_text(encoding="utf-8")
    assert shown == importlib.import_module("top_inference").parse_args([]).max_context_window
