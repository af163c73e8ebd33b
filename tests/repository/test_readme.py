"""README and the pages: their commands parse, their files, flags and links exist, and README stays short."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from stages import REPO, STAGES, page_commands

from dynamicrag.llm.prompts import Prompts

PAGES = {
    str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
    for path in [*REPO.glob("*.md"), *sorted(REPO.glob("docs/*.md")), *sorted(REPO.glob("examples/*/*.md"))]
}
README = PAGES["README.md"]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
FOLDERS = "scripts|recipes|configs|template|docs|dynamicrag|examples|tests|benchmarks|experiments"
FILE = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]*\w\.(?:sh|yaml|env|jinja|svg|png|py|md|json)\b")
# Flags that no file here has: argparse's --help, vLLM's, and one that docs/security.md says does not exist.
FOREIGN_FLAGS = {"--nodes", "--gpus-per-node", "--head", "--port", "--num-gpus", "--help", "--structured-outputs-config", "--untrusted"}
SHELL = {"bash", "curl", "llamafactory-cli", "source", "for", "done", "cp", "pip", "pre-commit"}  # a line may begin with python or with one of these words


def blocks(text: str, language: str = "bash") -> list[str]:
    return [block for name, block in FENCED.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """The code spans within lines."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def lines(block: str) -> list[str]:
    """The commands of a block, without the assignments before them: `SEEDS="1 2" bash x.sh` is `bash x.sh`."""
    joined = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in joined if line and line[0] != "#" and (command := re.sub(r'^(?:\w+=(?:"[^"]*"|\S*)(?:\s+|$))+', "", line))]


def commands(text: str) -> list[str]:
    """Every command of a page: the lines of its blocks, and the code spans that begin like a command."""
    within = [span for span in spans(text) if re.match(r"(?:\w+=\S+ )*(?:python|bash|llamafactory-cli) \S+", span)]
    return [line for block in [*blocks(text), *within] for line in lines(block)]


EVERY = sorted({(page, command) for page, text in PAGES.items() for command in commands(text)})
STARTED_BY_PYTHON = [(page, command) for page, command in EVERY if re.match(r"(?:\.venv/bin/)?python ", command)]


def parse(command: str, monkeypatch) -> None:
    """Give the arguments of a command to the parser of the script it starts."""
    _, script, *arguments = shlex.split(command, comments=True)
    if script == "-m":
        if arguments[0] != "pytest":
            importlib.import_module(f"{arguments[0]}.page").parse_args(arguments[1:])
        return
    path = REPO / script
    assert path.is_file()
    if path.parent.name in ("benchmarks", "tests"):  # these import the engine, so their flags are looked up in their source
        flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
        assert not [flag for flag in flags if f'"{flag}"' not in path.read_text(encoding="utf-8")]
        return
    monkeypatch.syspath_prepend(path.parent)
    importlib.import_module(path.stem).parse_args(arguments)


def test_readme_is_short_and_its_first_two_blocks_are_the_demo_and_the_tests():
    assert len(README.splitlines()) <= 180
    assert [block.strip() for _, block in FENCED.findall(README)[:2]] == ["bash scripts/demo.sh", "bash scripts/test.sh"]


@pytest.mark.parametrize(("page", "command"), STARTED_BY_PYTHON)
def test_command_is_understood_by_its_own_parser(page, command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize("command", ["python evaluate.py --no_such_flag", "python inference.py --selector best", "python benchmarks/retrieval.py --no_such_flag"])
def test_a_wrong_command_would_be_noticed(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        parse(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_shell_and_starts_only_what_is_checked(page):
    for block in blocks(PAGES[page]):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0
    begin = [command.split()[0] for name, command in EVERY if name == page and (name, command) not in STARTED_BY_PYTHON]
    assert set(begin) <= SHELL


@pytest.mark.parametrize(("page", "command"), [(page, command) for page, command in EVERY if re.match(r"bash |llamafactory-cli train ", command)])
def test_every_script_and_recipe_that_is_started_exists(page, command):
    words = shlex.split(command, comments=True)
    assert (REPO / words[2 if words[0] == "llamafactory-cli" else 1]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page):
    named = {REPO / path for path in FILE.findall(PAGES[page]) if "NAME" not in path}
    assert not [path for path in named if not path.exists()]
    here = {path.name for folder in ("", *FOLDERS.split("|"), "examples/factbook", "dynamicrag/*", "tests/*") for path in REPO.glob(f"{folder}/*" if folder else "*")}
    assert not [span for span in spans(PAGES[page]) if re.fullmatch(r"\w+\.(?:py|sh)", span) and span not in here]


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_named_exists(page):
    sources = "".join(
        path.read_text(encoding="utf-8")
        for pattern in ("*.py", "dynamicrag/**/*.py", "examples/**/*.py", "scripts/*", "benchmarks/**/*.py", "tests/freeze.py")
        for path in REPO.glob(pattern)
    )
    named = {flag for span in spans(PAGES[page]) for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", span)} - FOREIGN_FLAGS
    assert not [flag for flag in named if not re.search(rf'["(| \[]{re.sub("[-_]", "[-_]", flag)}["|)\] ]', sources)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[page])):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        path = (REPO / page).parent / place if place else REPO / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("stage", [f"{name}.py" for name in STAGES])
def test_docstring_command_is_understood(stage):
    """The parser takes the command in a stage's docstring as it is printed."""
    module = importlib.import_module(Path(stage).stem)
    command = re.search(rf"^    python {stage}.*?(?=^\S|\Z|\n\n)", module.__doc__, re.DOTALL | re.MULTILINE)
    assert command, "no command in the docstring"
    module.parse_args(shlex.split(command[0].replace("\\\n", " "))[2:])


def test_pages_defaults_and_settings_show_the_same_number_of_documents():
    """The number of documents is the same in the stages' defaults, on the page of the stages, and in the settings of each model's window."""
    defaults = {importlib.import_module(stage).parse_args([]).n_docs for stage in ("process_training_data",)}
    defaults |= {importlib.import_module(stage).parse_args([]).topn for stage in ("sampling_dpo_trajectories", "inference")}
    [shown] = defaults
    assert re.search(rf"\b{shown} documents\b", PAGES["docs/pipeline.md"]) and not [command for command in page_commands() if "--n_docs 20" in command]
    windows = {"llama3_8b": (shown, 8192), "llama2_7b": (shown // 2, 4096)}
    for model, (number, window) in windows.items():
        settings = (REPO / f"configs/{model}.env").read_text(encoding="utf-8")
        assert f"N_DOCS_SHOWN:-{number}}}" in settings
        assert f"cutoff_len: {window}" in (REPO / f"recipes/{model}/sft.yaml").read_text(encoding="utf-8")
    assert shown == importlib.import_module("top_inference").parse_args([]).max_context_window


@pytest.mark.parametrize("block", blocks("\n".join(PAGES.values()).replace("\n  ", "\n"), "yaml"))
def test_a_prompts_file_on_a_page_can_be_read(block, tmp_path):
    (tmp_path / "p.yaml").write_text(block)
    prompts = Prompts(str(tmp_path / "p.yaml"))
    docs = [{"id": "a", "title": "Carmen", "text": "An opera."}, {"id": "b", "title": "Nile", "text": "A river."}]
    shown = prompts.reranker("who?", docs)[-1]["content"]
    assert all(prompts.notation.write([n]) in shown for n in (1, 2)) and prompts.stop("generator") == ("\n",)
