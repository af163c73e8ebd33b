"""scripts/report.sh: the numbers are those of evaluate.py, the page needs no other file, no data is run, and its browser works."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from conftest import at, logged, names, naming, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from playwright.sync_api import expect
from stages import REPO

import evaluate
from dynamicrag.rows.output import Output
from dynamicrag.stage import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import screenshots

from dynamicrag.report import cases, reading
from dynamicrag.report import page as report

HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src=x onerror='window.hacked = 2'> \u2028 & \"quoted\" $\\frac$"
ANSWER = {"none": [], "top:1": [1], "top:2": [1, 2], "all": [1, 2, 3, 4], "monot5": [2], "dynamic": [2, 1]}


def documents(number: int) -> list[dict]:
    return [{"id": f"d{number}_{n}", "title": f"Title {number} {n}", "text": f"text {n} of {number} says gold{number}" if n == 2 else f"text {n}",
             "score": 1 - n / 10} for n in range(1, 7)]


def questions(count: int = 12, **more) -> list[dict]:
    """Questions of three kinds. Every third one is of a data set with a graded metric. Document 2 has the answer."""
    return [
        {"id": f"q{n}", "question": f"what is {n}?", "answers": [f"gold{n}"], "kind": ("one", "two", "long")[n % 3], "docs": documents(n),
         "dataset": "factbook_long" if n % 3 == 2 else "factbook", "gold_docs": [f"d{n}_2"], **more}
        for n in range(1, count + 1)
    ]


def finish_run(results: Path, name: str, rows: list[dict], selector: str = "dynamic", model: str = "dpo", right=lambda n: n % 2 == 0, failed=(),
               questions_file: str = "test", reranker: str | None = None, seconds: float = 4, **arguments) -> Path:
    """Write a results file, its remain file and their manifests, as inference.py does. `right` gives the right answers or the responses."""
    asked = write_jsonl(results.parent / f"{questions_file}.jsonl", rows)
    path, remain = results / f"{name}.json", results / f"{name}_remain.json"
    arguments = {"selector": selector, "topn": 4, **arguments}
    args = dict(input_json=str(asked), output_json=str(path), remain_output_json=str(remain), llm_model=f"models/{model}", reranker_model=reranker,
                     seed=1, on_error="fail", overwrite=False, **{key: value for key, value in arguments.items() if value is not None})
    out = Output(args, [str(path), str(remain)], [str(asked)])
    answered = []
    for n, row in enumerate(rows, start=1):
        ids = ANSWER.get(selector, [2, 1])
        row = {**row, "docs_shown": 4, "usage": {"calls": 2 if selector == "dynamic" else 1, "prompt_tokens": 100 + 10 * len(ids), "generated_tokens": 5}}
        if n in failed:
            answered.append({**row, "error": "no selection in the output"})
        else:
            response = right(n) if isinstance(right(n), str) else row["answers"][0] if right(n) else "something else"
            answered.append({**row, "id_list": ids, "final_docs": [row["docs"][i - 1]["id"] for i in ids], "response": response})
    for chunk in out.chunks(answered, 5):
        out.write(chunk)
    out.started -= seconds
    out.finish_answers()
    return path


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "run" / "results"
    folder.mkdir(parents=True)
    return folder


def make_drawn(results: Path, *flags: str) -> str:
    """The page of a folder of results."""
    report.main([str(results), *flags])
    return (results / "report/index.html").read_text(encoding="utf-8")


def make(results: Path, *flags: str) -> str:
    """The page with empty figures: they are made but not rendered, which takes longer than the rest of the page."""

    def save_empty(figure: Figure, file: io.StringIO | Path, **options) -> None:
        file.write("<svg></svg>") if isinstance(file, io.StringIO) else file.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_empty)
        return make_drawn(results, *flags)


def cells(page: str, file: str) -> list[str]:
    """The text of a line of the result table."""
    [line] = re.findall(rf'<tr data-file="{re.escape(file)}".*?</tr>', page, re.DOTALL)
    return [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", line, re.DOTALL)]


def case_data(page: str) -> list[dict]:
    [data] = re.findall(r'<script type="application/json" id="case-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


# ---------------------------------------------------------------- numbers


def test_the_numbers_are_evaluates(results):
    for selector in ANSWER:
        finish_run(results, f"test_{selector.replace(':', '')}", questions(97), selector, failed=(3, 5) if selector == "dynamic" else (),
                   right=lambda n: n % 3 and f"gold{n}{' more' * (n % 7 if n % 3 == 2 else 0)}")
    page = make(results)
    files = sorted(str(path) for path in results.glob("test_*.json") if not re.search(r"remain|manifest", path.name))
    assert len(files) == len(ANSWER)
    evaluate.main(["--results_file", *files, "--output_file", str(results / "m.metrics.json")])
    found = json.loads((results / "m.metrics.json").read_text())["results"]
    for file in files:
        one = found[Path(file).stem]
        label, score, _, interval, *rest = cells(page, Path(file).name)
        assert label == Path(file).stem.removeprefix("test_").replace("top", "top ")
        assert score == f"{one['score']:.1f}" and interval == f"{one['low']:.1f} to {one['high']:.1f}"
        assert rest == [str(one["n"]), f"{one['documents']:.2f}", f"{one['calls']:.1f}", f"{one['prompt_tokens']:.0f}", f"{one['generated_tokens']:.1f}",
                        str(one["unanswered"])]
    assert found["test_dynamic"]["unanswered"] == 2 and found["test_dynamic"]["n"] == 97
    kinds = [re.sub(r"<.*?>", " ", line).split() for line in re.findall(r"<tr><th scope=\"row\">dpo · dynamic.*?</tr>", page)]
    assert kinds[0][3:5] == ["50.8", "(2.0)"], "33 of the 65 of factbook are right: each third one is wrong, and the third has no answer"


def test_a_cost_that_is_not_known_is_no_zero_in_table_and_captions(results):
    unknown = {"usage": {"calls": 1, "prompt_tokens": None, "generated_tokens": None}}
    for selector in ("none", "top:1", "dynamic"):
        path = finish_run(results, f"test_{selector.replace(':', '')}", questions(12), selector)
        rows = [{**row, **unknown} for row in json.loads(path.read_text())]
        path.write_text(json.dumps(rows))
    page = make(results)
    assert cells(page, "test_dynamic.json")[6:9] == ["1.0", "", ""]
    captions = re.findall(r"<figcaption.*?</figcaption>", page, re.DOTALL)
    assert captions and not [caption for caption in captions if re.search(r"\b(0|nan|None) prompt tokens", caption)]


def test_who_answers_and_which_questions_say_the_manifests(results):
    finish_run(results, "a", questions(), model="x/dpo")
    finish_run(results, "b", questions(), "top:2", model="x/sft")
    finish_run(results, "c", questions(), model="x/sft", reranker="other/chooser")
    finish_run(results, "d", questions(), model="x/sft", reranker="other/chooser", prompts="mine.yaml")
    finish_run(results, "e", questions(5), model="x/dpo")  # the evaluation file was made again before
    read = reading.read_systems(results, None, 1)
    assert [(one.path.stem, one.evaluation_set) for one in read] == [("b", "test"), ("c", "test"), ("d", "test"), ("a", "test"), ("e", "test (2)")]
    called = [("sft · top 2",), ("sft · dynamic", "chooser", "(c)"), ("sft · dynamic", "chooser", "(d)"), ("dpo · dynamic",), ("dpo · dynamic",)]
    assert all(names(one.name, *values) for one, values in zip(read, called, strict=True))


def test_selectors_stand_from_none_to_dynamic_and_by_their_number(results):
    for selector in ("dynamic", "top:10", "none", "top:2", "monot5", "all"):
        finish_run(results, selector.replace(":", ""), questions(3), selector)
    assert [one.label for one in reading.read_systems(results, None, 1)] == ["none", "top 2", "top 10", "all", "monot5", "dynamic"]


def captions_of(page: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", unescape(caption)) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)]


def test_what_is_told_the_gold_documents_is_never_the_best(results):
    finish_run(results, "gold", questions(20), "gold", right=lambda n: True)
    for selector in ("top:2", "dynamic"):
        finish_run(results, selector.replace(":", ""), questions(20), selector)
    page = make(results)
    best = re.findall(r'<tr data-file="([^"]*)"(?:(?!</tr>).)*<b>', page, re.DOTALL)
    assert {*best} == {"top2.json", "dynamic.json"}
    assert any(names(caption, "dpo", "top 2", "50.0", "dynamic", 1) for caption in captions_of(page))


def test_runs_of_another_number_of_documents_say_so_and_are_compared_apart(results):
    finish_run(results, "dynamic", questions())
    finish_run(results, "all", questions(), "all")
    finish_run(results, "dynamic_of_6", questions(), topn=6)
    finish_run(results, "windows", questions(), None, topn=6, max_context_window=2)
    assert [(one.label, one.wider) for one in reading.read_systems(results, None, 1)] == [
        ("all", False), ("dynamic", False), ("dynamic, N = 6", True), ("windows, N = 6", True),
    ]
    page = make(results)
    figures = page[page.index('id="generators"'): page.index('id="topn"')]
    assert "N = 6" not in figures and "windows" not in figures and cells(page, "dynamic_of_6.json")[0] == "dynamic, N = 6"


def test_the_documents_needed_are_dprs_too(results):
    rows = [{key: value for key, value in row.items() if key != "gold_docs"} for row in questions(3)]
    rows[0]["positive_ctxs"] = [{"passage_id": "d1_2", "text": "t" * 1000}]
    finish_run(results, "test_dynamic", rows)
    [system] = reading.read_systems(results, None, 1)
    assert [row["needed"] for row in system.rows] == [1, None, None] and "positive_ctxs" not in system.rows[0]
    page = make(results)
    assert [case["gold"] for case in case_data(page)[0]["cases"]] == [[2], [], []]
    assert re.findall(r'<td class="number">([\d.]*)</td>', page[page.index("against gold documents"):])[:6] == ["50.0", "100.0", "66.7", "0.0", "1.00", "2.00"]


@pytest.mark.parametrize(("paths", "names"), [
    (["a/x/sft", "a/x/dpo"], ["sft", "dpo"]), (["a/x/sft", "a/y/sft"], ["x/sft", "y/sft"]), (["m"], ["m"]), ([], []),
])
def test_models_are_named_by_what_tells_them_apart(paths, names):
    assert [reading.short_names(paths)[path] for path in paths] == names


def test_files_that_are_no_results_are_left_out(results, caplog):
    finish_run(results, "test_dynamic", questions(), failed=(1,))
    (results / "stray.json").write_text("[]")
    (results / "sampling.json").write_text("[]")
    (results / "sampling.json.manifest.json").write_text(json.dumps({"arguments": {"input_json": "x"}, "outputs": ["sampling.json"]}))
    caplog.set_level("INFO", "dynamicrag")
    assert [one.path.name for one in reading.read_systems(results, None, 1)] == ["test_dynamic.json"]
    assert "stray.json" in caplog.text and "sampling.json" not in caplog.text


def test_results_without_gold_answers_are_left_out_and_those_that_cannot_be_read_are_an_error(results, caplog):
    finish_run(results, "test_dynamic", questions(), failed=(1,))
    finish_run(results, "open_dynamic", [{**row, "answers": [" "]} for row in questions()], questions_file="open")
    assert [one.path.stem for one in reading.read_systems(results, None, 1)] == ["test_dynamic"]
    assert logged(caplog, "open_dynamic.json") == 1
    (results / "test_dynamic_remain.json").unlink()
    with pytest.raises(UserError, match=at("test_dynamic_remain.json")):
        reading.read_systems(results, None, 1)


def test_a_copied_folder_is_read_by_itself(results):
    finish_run(results, "test_dynamic", questions(), failed=(1,))
    copied = Path(shutil.copytree(results, results.parent / "elsewhere/results"))
    (results / "test_dynamic_remain.json").write_text(json.dumps([{"id": f"q{n}", "question": "?", "answers": ["a"]} for n in (1, 98, 99)]))
    assert [len(one.rows) for one in reading.read_systems(copied, None, 1)] == [12]


def test_a_folder_without_results_is_an_error_that_names_the_script(results):
    with pytest.raises(UserError, match=at(results, "scripts/09_infer.sh")):
        report.main([str(results)])
    with pytest.raises(UserError, match=at(results / "nowhere")):
        report.main([str(results / "nowhere")])


# ---------------------------------------------------------------- sections


def test_a_section_without_data_says_in_a_line_what_makes_it(results):
    finish_run(results, "test_top1", questions(), "top:1")
    page = make(results)
    missing = unescape(re.sub(r"<.*?>", "", page[page.index('id="missing"'):]))
    for title, maker in (("Generators", "scripts/09_infer.sh"), ("Rerankers", "SELECTORS"), ("Fixed k", "SELECTORS"), ("Documents chosen", "09_infer"),
                         ("Training", "scripts/05_sft.sh"), ("Training", "scripts/08_dpo.sh"), ("Training", "scripts/iterate.sh"), ("Top N", "scripts/11_top_n.sh")):
        [line] = [line for line in missing.splitlines() if line.strip().startswith(title)]
        assert maker in line
    assert {path.stem for path in (results / "report").glob("*.png")} == {"efficiency_test"}
    assert "Published" not in page


def log_of(folder: Path, **last: float) -> None:
    folder.mkdir(parents=True)
    steps = [{"step": step, "loss": 1 / step, "rewards/accuracies": 0.5, "rewards/margins": 0.0, "rewards/chosen": 0.1, "rewards/rejected": 0.0} for step in (1, 2)]
    steps = [{key: value for key, value in step.items() if folder.name == "dpo" or "/" not in key} for step in steps]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*steps, {**steps[0], "step": 4, **last}, {"step": 4, "train_loss": 1}]}))


@pytest.mark.slow
def test_everything_there_is_has_a_figure_and_a_caption_of_its_numbers(results):
    for model in ("sft", "dpo"):
        for selector in ANSWER:
            finish_run(results, f"nq_{model}_{selector.replace(':', '')}", [{**row, "dataset": "nq"} for row in questions()], selector, model, questions_file="nq")
    rows = [{**row, "dataset": "nq"} for row in questions()]
    for n in (5, 6):
        finish_run(results, f"nq_top{n}", rows, None, topn=n, max_context_window=2, questions_file="nq", right=lambda number, n=n: number <= n)
    finish_run(results, "nq_monot5_of_6", rows, "monot5", topn=6, questions_file="nq", right=lambda number: number <= 3)
    run = results.parent
    log_of(run / "DynamicRAG_m/sft", loss=0.25)
    log_of(run / "DynamicRAG_m/dpo", **{"rewards/accuracies": 0.75})
    log_of(run / "rounds/1/DynamicRAG_m/dpo", **{"rewards/accuracies": 0.875})
    dev = {"score": 30.0, "low": 20.0, "high": 40.0, "documents": 1.0}
    (run / "rounds/rounds.json").write_text(json.dumps({"best": 1, "rounds": [{"dev": dev}, {"dev": {**dev, "score": 35.5}, "reward": {"reward": {"mean": 0.4}}}]}))
    page = make_drawn(results)
    assert 'id="missing"' not in page
    pictures = {"generators", "rerankers_nq", "k_nq", "chosen_nq", "sft", "dpo", "rounds", "topn_nq", "efficiency_nq"}
    assert {path.stem for path in (results / "report").glob("*.png")} == pictures
    captions = captions_of(page)
    for values in (
        ("SFT", "1.00", "0.25"), ("DPO", "1.00", "0.75"), ("round 1", "1.00", "0.88"), ("30.0, 35.5", "SFT", "round 1"), ("dpo dynamic", "50.0", "k = 2.00", 120),
        ("dpo · dynamic", 2, "100 %", "0 %"), ("dpo · by windows", "N = 5, 6", "41.7, 50.0"), ("dpo · monot5", "N = 4, 6", "50.0, 25.0"), ("nq", "dpo", 4, "50.0"), ("dynamic", 5),
    ):
        assert any(names(caption, *values) for caption in captions), (values, captions)


def test_generators_are_compared_on_every_data_set_of_every_evaluation_set(results):
    for model, right in (("sft", lambda n: False), ("dpo", lambda n: True)):
        finish_run(results, f"test_{model}", questions(60), model=model, right=right)
        finish_run(results, f"nq_{model}", [{**row, "dataset": "nq"} for row in questions()], model=model, questions_file="nq")
        finish_run(results, f"more_{model}", [{**row, "dataset": "nq" if n % 2 else "new"} for n, row in enumerate(questions())], model=model, questions_file="more")
    page = make(results)
    section = unescape(page[page.index('id="generators"'): page.index('id="rerankers"') if 'id="rerankers"' in page else page.index('id="chosen"')])
    bars = re.findall(r"\bnew, n = 6: [^\"]*", section)[0].split("; ")
    assert bars == [
        "new, n = 6: sft 0.0, dpo 0.0", "nq of more, n = 6: sft 100.0, dpo 100.0", "nq, n = 12: sft 50.0, dpo 50.0",
        "factbook, n = 40: sft 0.0, dpo 100.0", "factbook_long, n = 20: sft 0.0, dpo 100.0",
    ]
    assert any(names(caption, "dpo", 2, 5) for caption in captions_of(section))


def test_a_picture_is_drawn_for_both_widths_says_what_it_shows_and_lies_beside_the_page(results):
    finish_run(results, "test_dynamic", questions())
    finish_run(results, "test_top1", questions(), "top:1", right=lambda n: True)
    page = make_drawn(results)
    alts = re.findall(r'<svg role="img" aria-label="(.*?)"', page)
    assert len(alts) == 2 * page.count("<figure>") and all(len(alt) > 20 for alt in alts)
    ids = re.findall(r'\bid="([^"]+)"', re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert len(set(ids)) == len(ids)
    for path in (results / "report").glob("*.png"):
        assert struct.unpack(">I", path.read_bytes()[16:20])[0] == 1760, "twice the width on the page"


@pytest.mark.parametrize(("dataset", "shown"), [("nq", True), ("factbook", False)])
def test_published_numbers_stand_only_beside_runs_of_the_same_data_set(results, dataset, shown):
    finish_run(results, "r", [{**row, "dataset": dataset} for row in questions()])
    page = make(results)
    assert [text in page for text in ("48.4", "arXiv:2505.07233")] == [shown] * 2


# ---------------------------------------------------------------- the page


def test_the_page_stands_alone(results):
    finish_run(results, "test_dynamic", questions())
    page = make_drawn(results)
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import|<link', page)


def test_nothing_in_the_data_is_markup(results):
    rows = questions()
    rows[3] |= {"question": HOSTILE, "answers": [HOSTILE], "kind": HOSTILE, "id": HOSTILE}
    rows[3]["docs"][1] |= {"title": HOSTILE, "text": HOSTILE}
    finish_run(results, "test_dynamic", rows, model=f"m/{HOSTILE}")
    page = make_drawn(results)
    assert page.count("<script") == 2 == page.count("</script>") and "<!--" not in page and "<img" not in page and "\u2028" not in re.sub(r"<svg.*?</svg>", "", page[page.index('id="cases"'):], flags=re.DOTALL)
    [one] = case_data(page)
    [case] = [case for case in one["cases"] if case["id"] == HOSTILE]
    assert case["question"] == HOSTILE and [HOSTILE, HOSTILE] in one["documents"]


def test_cases_hold_each_document_once_and_refer_to_what_was_chosen(results):
    rows = questions()
    for row in rows:
        row["docs"] = documents(1)  # every question retrieves the same documents
    finish_run(results, "test_dynamic", rows, failed=(2,))
    finish_run(results, "test_all", rows, "all", right=lambda n: False)
    [data] = case_data(make(results))
    assert len(data["documents"]) == 6 and data["systems"] == ["dpo · all", "dpo · dynamic"] and data["systems"][data["reference"]] == "dpo · dynamic"
    first, second = data["cases"][:2]
    assert first["runs"][1][:3] == ["something else", 0.0, [2, 1]] and first["gold"] == [2] and first["needed"] == 1
    assert second["runs"][1][0] is None and second["runs"][1][3] == "no selection in the output" and second["lacking"] == ["d2_2"]
    assert second["graded"] and not first["graded"]


def test_of_hundreds_of_documents_the_first_and_those_that_matter_are_kept(results):
    rows = questions(2)
    rows[0]["docs"] = [{"id": f"x{n}", "title": "", "text": f"text {n}"} for n in range(1, 101)]
    rows[0]["gold_docs"] = ["x90"]
    finish_run(results, "test_dynamic", rows)
    first = case_data(make(results))[0]["cases"][0]
    assert [position for position, _ in first["docs"]] == [*range(1, 21), 90] and first["more"] == 79


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 40))
def test_cases_are_right_and_wrong_as_evenly_as_there_are(right, most):
    picked = cases.pick({str(n): float(one) for n, one in enumerate(right)}, most)
    assert len(picked) == min(most, len(right)) and picked == sorted(set(picked), key=int)
    of_right = sum(right[int(name)] for name in picked)
    assert min(of_right, len(picked) - of_right) >= min(most // 2, sum(right), len(right) - sum(right))


def test_the_cap_holds_and_none_is_none(results):
    finish_run(results, "test_dynamic", questions(), right=lambda n: n < 4)
    page = make(results, "--cases", "4")
    [data] = case_data(page)
    assert [case["id"] for case in data["cases"]] == ["q1", "q2", "q4", "q8"]
    assert "4 of 12 questions" in page
    assert "case-data" not in make(results, "--cases", "0")


def test_the_script_prints_the_path_and_asks_for_a_folder(results):
    finish_run(results, "test_dynamic", questions(3))
    done = subprocess.run(["bash", "scripts/report.sh", str(results), "--cases", "2"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(results / "report/index.html")
    asked = subprocess.run(["bash", "scripts/report.sh"], cwd=REPO, capture_output=True, text=True)
    assert asked.returncode == 2 and "usage" in asked.stderr


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    try:
        screenshots.find_chromium()
    except UserError as error:
        pytest.skip(str(error))
    with screenshots.browser() as started:
        yield started


@pytest.fixture(scope="session")
def page_file(tmp_path_factory) -> Path:
    """A report of two systems. One question and its documents are hostile, and the dynamic system has no answer to another one."""
    results = tmp_path_factory.mktemp("run") / "results"
    results.mkdir()
    rows = questions()
    rows[3] |= {"question": HOSTILE, "answers": [HOSTILE], "id": "odd/50%25 <b>"}
    rows[3]["docs"][1] |= {"title": HOSTILE, "text": HOSTILE}
    finish_run(results, "test_dynamic", rows, failed=(5,))
    finish_run(results, "test_top1", rows, "top:1", right=lambda n: n <= 6)
    make_drawn(results)
    return results / "report/index.html"


@pytest.fixture
def opened(page_file, chromium):
    """Opens the report in a window of this width. Afterwards it checks that the console has no message and that only the page was requested."""
    said, asked, pages = [], [], []

    def open_at(width: int = 1280, fragment: str = ""):
        page = screenshots.open_page(chromium, str(page_file), width, 900)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page.url + fragment)
        page.reload()  # which records everything from the start
        pages.append(page)
        return page

    yield open_at
    assert said == [] and {url.partition("#")[0] for url in asked} == {page_file.resolve().as_uri()}
    for page in pages:
        assert page.evaluate("window.hacked") is None
        page.close()


def listed(page) -> list[str]:
    return [text.splitlines()[0] for text in page.locator("#case-list a").all_inner_texts()]


def test_cases_are_filtered_by_text_answer_kind_documents_and_disagreement(opened):
    page = opened()
    assert len(listed(page)) == 12
    page.locator("#filter-text").fill("GOLD7")
    assert listed(page) == ["what is 7?"], "an answer and a document have it"
    page.locator("#filter-text").fill("")
    page.locator("#filter-outcome").select_option("wrong")
    assert listed(page) == [f"what is {n}?" for n in (1, 3, 7, 9, 11)], "of the dynamic system; the fifth has no answer"
    page.locator("#filter-outcome").select_option("unanswered")
    assert listed(page) == ["what is 5?"]
    page.locator("#filter-outcome").select_option("wrong")
    page.locator("#filter-system").select_option(label="dpo · top 1")
    assert listed(page) == [f"what is {n}?" for n in range(7, 13)]
    page.locator("#filter-kind").select_option("two")
    assert listed(page) == ["what is 7?", "what is 10?"]
    page.locator("#filter-outcome").select_option("")
    page.locator("#filter-disagree").check()
    assert listed(page) == ["what is 1?", "what is 10?"]
    page.locator("#filter-k").select_option("2")
    assert listed(page) == [] and page.locator("#case-count").inner_text() == "0 of 12 questions"
    page.locator("#filter-system").select_option(label="dpo · dynamic")
    assert listed(page) == ["what is 1?", "what is 10?"] and page.locator("#case-detail h3").inner_text() == "what is 1?"


def test_a_case_opens_by_click_by_keyboard_and_by_its_address(opened):
    page = opened()
    heading = page.locator("#case-detail h3")
    page.locator("#case-list a").nth(1).click()
    expect(heading).to_have_text("what is 2?")
    expect(heading).to_be_focused()
    assert page.url.endswith("#case-q2")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(heading).to_have_text("what is 3?")
    page.get_by_role("button", name="Next").press("Enter")
    expect(heading).to_contain_text("window.hacked")
    assert heading.text_content() == HOSTILE
    page.keyboard.press("Enter")  # the button still has the focus
    expect(heading).to_have_text("what is 5?")
    page.go_back()
    expect(heading).to_contain_text("window.hacked")
    assert opened(fragment="#case-odd%2F50%2525%20%3Cb%3E").locator("#case-detail h3").text_content() == HOSTILE
    assert opened(fragment="#case-%zz").locator("#case-detail h3").inner_text() == "what is 1?", "no such case: the first"


def test_an_open_case_shows_every_answer_and_what_was_chosen_in_which_order(opened):
    page = opened(fragment="#case-q7")
    lines = [[cell.strip() for cell in text.split("\t")] for text in page.locator("#case-detail tbody tr").all_inner_texts()]
    assert lines == [["dpo · top 1", "something else", "✗ wrong", "[1]"], ["dpo · dynamic", "something else", "✗ wrong", "[2], [1]"]]
    shown = page.locator(".docs > li")
    tags = [entry.locator(".tag").all_inner_texts() for entry in shown.all()]
    assert tags == [["chosen 2nd"], ["gold", "chosen 1st"], [], [], tags[4], tags[4]] and len(tags[4]) == 1, "the last two were not shown to the model"
    assert page.locator("mark").all_inner_texts() == ["gold7"]
    page.get_by_role("button", name="dpo · top 1").click()
    assert shown.locator(".tag.rank").all_inner_texts() == ["chosen 1st"] and page.locator("#filter-system").input_value() == "0"
    assert page.locator("#case-detail").inner_text().rstrip().endswith("text 6"), "and nothing more"
    page = opened(fragment="#case-q2")
    assert page.locator("#case-detail tbody td.range").all_inner_texts() == ["1.00", "1.00"], "graded"
    page = opened(fragment="#case-q5")
    assert "no selection in the output" in page.locator("#case-detail tbody").inner_text() and "no answer" in page.locator("#case-detail tbody").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    shown = page.locator("figure svg:visible")
    assert shown.count() == page.locator("figure").count() and all(box["width"] <= width for box in (svg.bounding_box() for svg in shown.all()))
    letters = page.evaluate("Math.min(...[...document.querySelectorAll('figure svg text')].filter(text => text.getClientRects().length).map(text => text.getBoundingClientRect().height))")
    assert letters > 9, "in CSS pixels"


# ---------------------------------------------------------------- pictures of it


def test_pictures_are_taken_at_both_widths(chromium, page_file, tmp_path):
    script = "import sys, screenshots; screenshots.main(sys.argv[1:])"  # in a new process, since a thread can have only one Playwright
    subprocess.run([sys.executable, "-c", script, str(page_file), "--output_dir", str(tmp_path / "docs")], check=True, cwd=REPO / "experiments")
    widths = {path.stem: struct.unpack(">I", path.read_bytes()[16:20])[0] for path in (tmp_path / "docs").iterdir()}
    assert widths["report_desktop"] == 1280 and widths["report_phone"] == 780 and widths["report_case"] == 1280


def test_no_chromium_is_an_error_that_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(UserError, match=naming("chromium", "CHROMIUM")):
        screenshots.find_chromium()
    monkeypatch.setenv("CHROMIUM", "/no/such/browser")
    with pytest.raises(UserError, match=at("CHROMIUM=/no/such/browser")):
        screenshots.find_chromium()
    with pytest.raises(UserError, match=at("index.html", "scripts/report.sh")):
        screenshots.main([str(tmp_path / "index.html")])
