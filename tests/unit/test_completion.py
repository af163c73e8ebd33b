"""dynamicrag/llm/completion.py: the text of a reply without its reasoning, the reason if there is none, and the file of replies of an unfinished run."""

import pytest
from conftest import names

from dynamicrag.llm.completion import (
    Request,
    Sample,
    after_reasoning,
    completion_of,
    leaves_open,
    opens_itself,
    read_sample,
    refused,
)
from dynamicrag.llm.completion_cache import CompletionCache, key_of
from dynamicrag.llm.requests import read_selection
from dynamicrag.rows.identifiers import DEFAULT_NOTATION

ASKED = Request([{"role": "user", "content": "q"}], seed=1, max_tokens=100, n=2)


@pytest.mark.parametrize(("text", "says"), [
    ("Georges Bizet", "Georges Bizet"), ("  [3] \n", "[3]"), ("", ""), ("  ", ""), ("a < b, think > c", "a < b, think > c"),
    ("<think>[1]? No.</think>\n\n[3]", "[3]"), ("<thinking>[1]</thinking>[3]", "[3]"), ("<reasoning>[1]</reasoning> [3]", "[3]"), ("<THINK>a</Think>b", "b"),
    ("< think >[1]</ think >[3]", "[3]"), ("[THINK]a[/THINK]b", "b"), ("<think></think>\n\nb", "b"), ("<think>\n\n</think>\n\n", None),
    ("<think>a</think>x<think>b</think>y", "y"), ("<think>a <think> b</think>y", "y"), ("x <think>a</think> y", "y"), ("<think>a</thinking>y", "y"),
    ("So [1] is no help.</think>\n[3]", "[3]"), ("So [1] is no help.</think>", None), ("a</think>b</think>c", "c"),
    ("<think>[1] is about", None), ("[1]\n<think>or rather", None), ("<think>a</think><think>b", None), ("<think>", None), ("x<think>a</think>", None),
])
def test_what_follows_the_reasoning_counts_and_nothing_else(text, says):
    assert after_reasoning(text) == says


@pytest.mark.parametrize(("text", "says"), [("[1] is about", None), ("[1]?</think>[3]", "[3]"), ("<think>a</think>b", "b"), ("", None), ("a</think>", None)])
def test_a_template_that_opens_the_reasoning_makes_all_of_an_unclosed_text_reasoning(text, says):
    assert after_reasoning(text, opened=True) == says


@pytest.mark.parametrize(("prefix", "opened", "left_open"), [
    ("", False, False), ("", True, True), ("<think>\n", False, True), ("<think>\n</think>\n", False, False), ("</think>\nAnswer:", True, False), ("Answer:", True, True),
])
def test_a_prefix_opens_reasoning_or_ends_it(prefix, opened, left_open):
    assert leaves_open(prefix, opened) is left_open


@pytest.mark.parametrize(("text", "itself"), [("a</think>b", True), ("<think>a</think>b", False), ("b", False), ("<think>a", False), ("a</think><think>b</think>", True)])
def test_a_missing_opening_tag_is_the_templates(text, itself):
    assert opens_itself(text) is itself


SAMPLES = [  # a sample, its text, and the cause if it has none
    (Sample("[3]"), "[3]", ""), (Sample("[3]", "length"), "[3]", ""), (Sample(""), "", ""), (Sample("[3]", None), "[3]", ""),
    (Sample("[3]", reasoned=True), "[3]", ""), (Sample("<think>a</think>[3]", "length"), "[3]", ""),
    (Sample("<think>a", "length"), "", "cut in reasoning"), (Sample(None, "length", reasoned=True), "", "cut in reasoning"),
    (Sample("<think>a</think>"), "", "only reasoning"), (Sample("", reasoned=True), "", "only reasoning"), (Sample("", "length"), "", "cut at once"),
    (Sample(None), "", "no text"), (Sample(None, "tool_calls"), "", "no text"), (Sample("Georges", "content_filter"), "", "filter"),
    (Sample("Georges", "abort"), "", "abort"), (Sample(None, refusal="declined: 7"), "", "refusal"),
]


@pytest.mark.parametrize(("sample", "text", "cause"), SAMPLES)
def test_a_sample_is_a_text_or_a_reason(sample, text, cause):
    found, reason = read_sample(sample, 100)
    assert found == text and bool(reason) == bool(cause)
    assert names(reason, 100) == cause.startswith("cut") and ("declined: 7" in reason) == (cause == "refusal")


def test_each_cause_has_a_reason_of_its_own():
    reasons = {(cause, read_sample(sample, 100)[1]) for sample, _, cause in SAMPLES}
    assert len(reasons) == len({cause for cause, _ in reasons}) == len({reason for _, reason in reasons})


def test_each_sample_of_a_completion_is_read_by_itself():
    completion = completion_of([Sample("<think>a</think>[3], [1", "length"), Sample("<think>a", "length")], ASKED, 7, 9)
    assert completion.texts == ["[3], [1", ""] and completion.cut_off == {0, 1}
    assert [read_selection(completion, sample, 5, DEFAULT_NOTATION).ids for sample in (0, 1)] == [[3], []]
    assert read_selection(completion, 0, 5, DEFAULT_NOTATION).valid and names(read_selection(completion, 1, 5, DEFAULT_NOTATION).reason, "selection", 100)
    assert completion.reason("answer", 0) == "" and names(completion.reason("answer", 1), "answer", 100)


def test_a_constrained_text_holds_no_reasoning_even_if_the_template_opens_some():
    free, held = (Request(ASKED.messages, 1, 100, pattern=pattern) for pattern in (None, r"None|\[1\]"))
    assert completion_of([Sample("[1]")], free, opened=True).reason("selection") and completion_of([Sample("[1]")], held, opened=True).texts == ["[1]"]


def test_a_refused_request_has_a_reason_for_every_sample_and_no_text():
    completion = refused(ASKED, "HTTP 400: x")
    assert completion.texts == ["", ""] and not completion.answered
    assert [completion.reason("selection", sample) for sample in (0, 1)] == ["HTTP 400: x"] * 2


# ---------------------------------------------------------------- replies on disk


def test_replies_survive_a_kill_and_a_torn_line(tmp_path):
    replies = {f"k{n}": ([Sample(f"text \n {n}", "length", True, None), Sample(None)], n, 2 * n) for n in range(5)}
    cache = CompletionCache(tmp_path / "out.json")
    for key, reply in replies.items():
        assert cache.get(key) is None
        cache.put(key, reply)
    assert cache.path.name == "out.json.partial.completions.jsonl"
    cache.path.write_bytes(cache.path.read_bytes()[:-20])  # the last line is cut off, since `cache` was never closed
    again = CompletionCache(tmp_path / "out.json")
    assert {key: again.get(key) for key in replies} == {**replies, "k4": None}
    replies["k4"] = replies["k4"][0], None, None  # a server that does not report the cost
    again.put("k4", replies["k4"])
    assert CompletionCache(tmp_path / "out.json").get("k4") == replies["k4"]
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b'["k", [["a", "stop", false, null, 1]], 1, 1]', b'["k", [[5]], 1, 1]', b'["k", [["a"]], "1", 1]', b"7", b'["k", 1, 1, 1]'])
def test_what_is_no_reply_is_left_out(tmp_path, line):
    cache = CompletionCache(tmp_path / "out.json")
    cache.path.write_bytes(line + b"\n" + b'["good", [["a"]], 1, 2]\n')
    assert cache.get("k") is None and cache.get("good") == ([Sample("a")], 1, 2)


def test_a_key_is_all_that_decides_a_reply():
    keys = {key_of("m", ASKED), key_of("n", ASKED), key_of("m", ASKED, "on")} | {
        key_of("m", Request(**{**vars(ASKED), name: value})) for name, value in {
            "messages": [{"role": "user", "content": "r"}], "seed": 2, "max_tokens": 9, "n": 3, "temperature": 0.5, "top_p": 0.5, "pattern": "None",
        }.items()
    }
    assert len(keys) == 10 and key_of("m", Request(**{**vars(ASKED), "limit": "--other"})) == key_of("m", ASKED)
