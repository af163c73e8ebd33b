"""dynamicrag/rows/identifiers.py: identifiers, written and read."""

import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynamicrag.rows.identifiers import DEFAULT_NOTATION, Notation, Selection, format_ids, ids_pattern, parse_ids

selections = st.integers(0, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), unique=True, max_size=n) if n else st.just([]))
)
prose = st.text(max_size=60) | st.lists(
    st.sampled_from(["[", "]", "0", "1", "2", "10", "41", " ", ", ", "None", "none", "-", "²", "٣", "[3]", "[ 2 ]", "\n"]), max_size=20
).map("".join)


@pytest.mark.parametrize(("ids", "text"), [([], "None"), ([3], "[3]"), ([3, 1], "[3], [1]"), ((10, 2), "[10], [2]")])
def test_a_selection_is_written_like_this(ids, text):
    assert format_ids(ids) == text


@given(selections)
def test_reading_is_the_inverse_of_writing(case):
    n, ids = case
    assert parse_ids(format_ids(ids), n) == Selection(ids, True)


@given(text=prose, n=st.integers(0, 50))
@example(text="[" + "9" * 10_000 + "]", n=50)
@example(text="[" + "0" * 10_000 + "1]", n=50)
def test_nothing_outside_the_documents_is_ever_read_and_nothing_twice(text, n):
    selection = parse_ids(text, n)
    assert all(1 <= position <= n for position in selection.ids)
    assert len(set(selection.ids)) == len(selection.ids)
    if selection.ids:
        assert selection.valid


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        # identifiers in order, none twice, and only those of the documents
        ("[0], [3], [41], [3], [1]", 40, Selection([3, 1], True, 2, 1)),
        ("[41]", 40, Selection([], False, 1, 0)), ("[0]", 40, Selection([], False, 1, 0)),
        ("[40]", 40, Selection([40], True)), ("[ 4 ]", 40, Selection([4], True)), ("[04]", 40, Selection([4], True)),
        ("[" + "9" * 100_000 + "], [2]", 40, Selection([2], True, 1)), ("[1]", 0, Selection([], False, 1)),
        # None, and texts that are not None
        ("None", 40, Selection([], True)), ("none.", 40, Selection([], True)), ("[None]", 40, Selection([], True)), ("None", 0, Selection([], True)),
        ("Document 3 is needed, none of the others", 40, Selection([], False)), ("None, [3]", 40, Selection([], False)),
        ("None [99]", 40, Selection([], False)), ("None of them.", 40, Selection([], False)), ("no document", 40, Selection([], False)),
        ("nonetheless", 40, Selection([], False)), ("", 40, Selection([], False)), ("none\0", 40, Selection([], False)),
        # other forms of a list
        ("[1, 3]", 40, Selection([1, 3], True)), ("3, 1", 40, Selection([3, 1], True)), ("3", 40, Selection([3], True)),
        ("Doc 3", 40, Selection([3], True)), ("Documents 3 and 1", 40, Selection([3, 1], True)), ("[Doc 3], [doc1]", 40, Selection([3, 1], True)),
        ("[1] > [2]", 40, Selection([1, 2], True)), ("[3][1]", 40, Selection([3, 1], True)), ("[3] [1].", 40, Selection([3, 1], True)),
        ("[3]\n[1]", 40, Selection([3, 1], True)), ("- [3]\n- [1]", 40, Selection([3, 1], True)), ("**[3], [1]**", 40, Selection([3, 1], True)),
        ("[[7]]", 40, Selection([7], True)), ("[3], [1],", 40, Selection([3, 1], True)), ('["3", "1"]', 40, Selection([3, 1], True)),
        ("\uff3b3\uff3d\u3001\uff3b1\uff3d", 40, Selection([3, 1], True)), ("\u30103\u3011", 40, Selection([3], True)),
        ("[1]-[3]", 40, Selection([1, 2, 3], True)), ("[2\u20134], 1", 40, Selection([2, 3, 4, 1], True)), ("[3]-[7]", 5, Selection([3, 4, 5], True, 2)),
        ("[2]-[3], [1]-[3]", 5, Selection([2, 3, 1], True, 0, 2)), ("[1]-[999999999]", 2, Selection([1, 2], True, 999999997)),
        # a list at the end, and lead-ins
        ("Answer: NONE", 40, Selection([], True)), ("Answer: [3]", 40, Selection([3], True)), ("The needed documents are:\n[3], [1]", 40, Selection([3, 1], True)),
        ("[1] is about bread.\n\n[3], [2]", 40, Selection([3, 2], True)), ("[1] is about bread.\n**Final answer:** [3]", 40, Selection([3], True)),
        # no list at the end
        ("the documents [2] and [5] help.", 40, Selection([], False)), ("[3]\n\nIt names him.", 40, Selection([], False)),
        ("[1] is about bread.\n[3]", 40, Selection([], False)), ("Not needed: [1]", 40, Selection([], False)),
        ("Needed: [3]\nNot needed: [1]", 40, Selection([], False)), ("Not needed:\n\n[1]", 40, Selection([], False)),
        ("[3] it is\nAnswer:", 40, Selection([], False)), ("1. [3]\n2. [1]", 40, Selection([], False)), ("3 1", 40, Selection([], False)),
        ("[3]-[1]", 40, Selection([], False)), ("[3], [1", 40, Selection([], False)), ("[1]]", 40, Selection([], False)),
        ("[-1]", 40, Selection([], False)), ("[1.5]", 40, Selection([], False)), ("[\u00b2]", 40, Selection([], False)), ("[\u0663]", 40, Selection([], False)),
    ],
)
def test_none_is_not_the_same_as_invalid(text, n, expected):
    assert parse_ids(text, n) == expected


@pytest.mark.parametrize(("text", "ids"), [
    ("[3], [12", [3]), ("[3], [12]", [3, 12]), ("3, 12", [3]), ("3, 12,", [3, 12]), ("[3, 1, 2", [3, 1]), ("[3], [", [3]), ("[3], [1]", [3, 1]),
])
def test_half_of_a_number_is_not_read(text, ids):
    assert parse_ids(text, 40, cut_off=True) == Selection(ids, True)
    assert not parse_ids("It is [1", 40, cut_off=True).valid and not parse_ids("3", 40, cut_off=True).valid


@given(text=prose, n=st.integers(0, 45))
def test_what_cannot_be_read_has_a_reason_and_what_can_be_has_none(text, n):
    selection = parse_ids(text, n)
    assert selection.valid == (selection.reason == "")


def test_reading_takes_time_in_proportion_to_the_text():
    assert parse_ids("[" * 100_000 + "[ " * 50_000, 40) == Selection([], False)
    assert parse_ids("[" + " " * 100_000, 40).valid is False


@given(selections)
def test_every_well_formed_selection_is_allowed(case):
    n, ids = case
    assert re.fullmatch(ids_pattern(n), format_ids(ids))


@given(n=st.integers(0, 45), data=st.data())
def test_everything_allowed_can_be_read(n, data):
    text = data.draw(st.from_regex(ids_pattern(n), fullmatch=True))
    selection = parse_ids(text, n)
    assert selection.valid
    assert selection.out_of_range == 0
    assert format_ids(list(dict.fromkeys(map(int, re.findall(r"\d+", text))))) == format_ids(selection.ids)


@given(text=prose, n=st.integers(0, 45))
def test_nothing_else_is_allowed(text, n):
    if re.fullmatch(ids_pattern(n), text):
        assert re.fullmatch(r"None|\[\d+\](, \[\d+\])*", text)
        assert all(1 <= int(position) <= n for position in re.findall(r"\d+", text))


@pytest.mark.parametrize(
    ("n", "text", "allowed"),
    [
        (3, "[1], [2], [3]", True), (3, "[1], [2], [3], [1]", False), (3, "[4]", False), (3, "[1],[2]", False), (3, "[1], ", False),
        (3, "", False), (3, "None, [1]", False), (12, "[12], [1]", True), (12, "[13]", False), (0, "None", True), (0, "[1]", False),
    ],
)
def test_a_pattern_admits_lists_of_valid_identifiers_alone(n, text, allowed):
    assert bool(re.fullmatch(ids_pattern(n), text)) == allowed


def test_a_pattern_stays_small():
    assert len(ids_pattern(500)) < 10_000
    text = format_ids(random.Random(1).sample(range(1, 501), 500))
    assert re.fullmatch(ids_pattern(500), text)


# ---------------------------------------------------------------- other notations

NOTATIONS = [
    DEFAULT_NOTATION, Notation("D{n}", " > ", "-"), Notation("{n}", ",", "none"), Notation("<{n}>", "", "[0]"), Notation("Passage #{n}.", "\n", "No passage."),
    Notation("({n})", " ", "()"), Notation("doc_{n}$", "|", "^"), Notation("\u7b2c{n}\u6bb5", "\u3001", "\u65e0"), Notation("{{{n}}}", ", ", "{}"),
]


@given(case=selections, notation=st.sampled_from(NOTATIONS))
def test_every_notation_is_read_as_it_is_written_and_is_what_the_pattern_admits(case, notation):
    n, ids = case
    text = format_ids(ids, notation)
    assert parse_ids(text, n, notation=notation) == Selection(ids, True)
    assert re.fullmatch(ids_pattern(n, notation), text)


@given(n=st.integers(0, 12), notation=st.sampled_from(NOTATIONS), data=st.data())
def test_everything_a_notations_pattern_admits_can_be_read(n, notation, data):
    text = data.draw(st.from_regex(ids_pattern(n, notation), fullmatch=True))
    selection = parse_ids(text, n, notation=notation)
    assert selection.valid and selection.out_of_range == 0 and (selection.ids == []) == (text == notation.none)


@given(case=selections, notation=st.sampled_from(NOTATIONS), data=st.data())
def test_of_a_selection_that_is_cut_off_the_whole_identifiers_are_read(case, notation, data):
    n, ids = case
    text = format_ids(ids, notation)
    cut = text[: data.draw(st.integers(0, len(text)))]
    read = parse_ids(cut, n, cut_off=True, notation=notation).ids
    assert read == ids[: len(read)]
    # Only the last identifier may be missing, since it is cut off or could have more digits.
    assert len(read) >= sum(len(format_ids(ids[:k], notation)) < len(cut) for k in range(1, len(ids) + 1)) - 1 if ids else not read


@pytest.mark.parametrize(("text", "ids"), [("3,1", [3]), ("3,12,", [3, 12]), ("3", []), ("12,3,", [12, 3])])
def test_a_number_that_may_go_on_is_not_read_in_a_notation_of_numbers_alone(text, ids):
    assert parse_ids(text, 40, cut_off=True, notation=Notation("{n}", ",", "none")).ids == ids


@pytest.mark.parametrize("text", ["[3], [1]", "3, 1", "Answer: [3] > [1]"])
def test_usual_forms_count_beside_a_notation(text):
    assert parse_ids(text, 5, notation=Notation("D{n}", " > ", "-")) == Selection([3, 1], True)


@pytest.mark.parametrize("text", ["D3 or D1", "d3", "D03", "D3 >  D1", "-, D3", "D3 > ", "", "D"])
def test_nothing_but_the_notation_is_read_by_it(text):
    assert Notation("D{n}", " > ", "-").read(text) is None


def test_a_notation_counts_what_is_outside_and_what_stands_twice():
    assert parse_ids("D7 > D2 > D2 > D" + "9" * 20, 5, notation=Notation("D{n}", " > ", "-")) == Selection([2], True, 2, 1)


@pytest.mark.parametrize("parts", [("D", ", ", "-"), ("{n}{n}", ", ", "-"), ("{n}", "", "-"), ("1{n}", "", "-"), ("D{n}", ", ", "D1"), ("D{n}", ", ", "D1, D2")])
def test_a_notation_that_cannot_be_read_back_is_refused(parts):
    with pytest.raises(ValueError):
        Notation(*parts)
