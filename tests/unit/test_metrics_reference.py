"""dynamicrag/evaluation/metrics.py against public references: the package rouge-score, and the published formulae, written again here.

Each metric is compared on some thousand pairs of a response and a gold answer, from a seed: mutations of difficult texts, and
unrelated texts. If the project's metric differs from the reference on purpose, the test names the kind of pairs, checks that no
other pair differs, and says what the reference gets wrong.
"""

import itertools
import random
import re
import string
import unicodedata

import pytest
from nltk.stem.porter import PorterStemmer

from dynamicrag.evaluation import metrics
from dynamicrag.evaluation.metrics import METRICS, score_row

NFD = unicodedata.normalize("NFD", "São Tomé, Malmö, Ångström, Việt Nam")
AWKWARD = [
    "", " ", "\t\n", "\u3000\u2003", "\u200b", "the", "The", "a", "A", "an AN", "a the", "the.", "(a)", "...", "?!", "…", ".", "-", "—", "“”", "'", "''",
    "São Tomé, Malmö, Ångström, Việt Nam", NFD, "é", "e\u0301", "a\u0301", "a\u0489", "ﬁve", "five", "Ⅳ", "½", "x²", "ＡＢＣ", "ABC", "İstanbul", "i̇stanbul", "ẞ",
    "STRASSE", "straße", "ß", "Ωmega", "Ω", "東京", "東京都は日本の首都です。", "東京、大阪", "한국어", "ﾊﾝｶｸ", "ハンカク", "مرحبا", "שלום", "नमस्ते", "🙂", "👩‍👩‍👧", "42", "42.0", "1,000",
    "1000", "1 000", "-5", "−5", "$3.5 billion", "3.5%", "1e5", "0", "007", "٣", "U.S.", "US", "u s", "two-thirds", "twothirds", "two thirds", "it's", "its",
    "it’s", "rock 'n' roll", "C++", "C#", "theatre", "another", "anthem", "banana", "a_b", "x-a-x", "the-the", "The Who", "Who", "The The", "An", "A, B and the C",
    "the cat sat on the mat", "The  cat\nsat, on a mat.", "mat the on sat cat the", "Dr. Smith went to Washington. He was not alone.", "One. Two. Three.",
    "running runs ran runner", "run", "generously general generals", "New\u00a0York", "New York", "new york city", "New\u2028York", "NEW-YORK", "None", "[3], [1]",
    "word " * 400, "the " * 300, "x" * 3000, "." * 2000, "东" * 500,
]
SHORT = [text for text in AWKWARD if len(text) < 200]


def mutate(rng: random.Random, text: str) -> str:
    """A text near `text`: in another case or form, with more text around it, or with dropped, repeated or moved words."""
    words = text.split()
    kind = rng.randrange(12)
    if kind == 0:
        return text
    if kind == 1:
        return rng.choice([str.upper, str.lower, str.title, str.swapcase])(text)
    if kind == 2:
        return unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    if kind == 3:
        return f"{rng.choice(['the', 'A', 'an ', 'The '])} {text}{rng.choice('.!?)')}"
    if kind == 4:
        return f"{rng.choice(SHORT)} {text} {rng.choice(SHORT)}"
    if kind == 5:
        return f"I think it is {text}, {rng.choice(SHORT)}."
    if kind == 6:
        return text.replace(" ", rng.choice(["\n", "  ", "\u00a0", "-", ""]))
    if kind == 7:
        return " ".join(rng.sample(words, len(words)))
    if kind == 8:
        return " ".join(word for word in words if rng.random() < 0.6)
    if kind == 9:
        return " ".join([*words, *rng.choices(words, k=2)]) if words else text
    if kind == 10:
        return "".join(f"{letter}{rng.choice(['', '', '', rng.choice(string.punctuation)])}" for letter in text)
    return text[rng.randrange(len(text) + 1) :]


def make_pairs(seed: int, count: int, longest: int) -> list[tuple[str, str]]:
    """`count` pairs of response and answer: every difficult text with itself and with the articles, then mutations, then unrelated texts."""
    rng = random.Random(seed)
    texts = [text[:longest] for text in AWKWARD]
    pairs = [(text, text) for text in texts] + list(itertools.product(texts[:22], repeat=2))
    while len(pairs) < count:
        gold = rng.choice(texts) if rng.random() < 0.5 else " ".join(rng.choices(SHORT, k=rng.randint(1, 4)))[:longest]
        response = mutate(rng, gold) if rng.random() < 0.7 else rng.choice(texts)
        pairs.append((response, gold) if rng.random() < 0.8 else (gold, response))
    return pairs


PAIRS = make_pairs(11, 6000, 4000)


# ---------------------------------------------------------------- the references


def squad_form(text: str) -> str:
    """SQuAD v1.1: lower case, then without ASCII punctuation, then without articles, then single spaces."""
    text = "".join("" if character in string.punctuation else character for character in text.lower())
    return re.sub(r"\s+", " ", re.sub(r"\b(?:the|an?)\b", " ", text)).strip()


def squad_em(response: str, answer: str) -> float:
    return 1.0 if squad_form(response) == squad_form(answer) else 0.0


def squad_f1(response: str, answer: str) -> float:
    """F1 of precision and recall, or 0 if no word is shared."""
    given, gold = squad_form(response).split(), squad_form(answer).split()
    left = list(gold)
    shared = 0
    for word in given:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def contains(response: str, answer: str) -> float:
    """As in ALCE and the evaluations of PopQA: the normalised answer occurs in the normalised response."""
    return float(squad_form(answer) in squad_form(response))


def alce_str_em(response: str, qa_pairs: list[list[str]]) -> float:
    """As in ALCE: the share of readings of which a short answer occurs in the response."""
    return sum(max([contains(response, answer) for answer in answers], default=0.0) for answers in qa_pairs) / len(qa_pairs)


def composed(text: str) -> str:
    """The text in NFKC, with the quotes and dashes of a keyboard."""
    for marks, plain in (("‘’‚‛´", "'"), ("“”„‟«»", '"'), ("‐‑‒–—―−", "-")):
        text = re.sub(f"[{marks}]", plain, text)
    return unicodedata.normalize("NFKC", text)


def leaves_nothing(text: str) -> bool:
    """Whether a text has only white space, ASCII punctuation and articles."""
    return squad_form(composed(text)) == ""


def as_it_reads(text: str) -> str:
    """The words of a text, with articles, without case and punctuation. If it has no words, its marks."""
    text = composed(text).lower()
    return " ".join("".join(character for character in text if character not in string.punctuation).split()) or text.strip()


# ---------------------------------------------------------------- em, f1, match: SQuAD v1.1, ALCE


def test_there_are_pairs_of_every_kind():
    """Without such pairs the agreement below would mean little."""
    assert len(PAIRS) >= 6000
    equal = sum(squad_em(*pair) for pair in PAIRS)
    partial = sum(0 < squad_f1(*pair) < 1 for pair in PAIRS)
    assert equal > 1000 and partial > 1000 and len(PAIRS) - equal - partial > 1000
    assert sum(composed(response) != response or composed(answer) != answer for response, answer in PAIRS) > 500
    assert sum(leaves_nothing(response) != leaves_nothing(answer) for response, answer in PAIRS) > 200
    assert sum(leaves_nothing(response) and leaves_nothing(answer) for response, answer in PAIRS) > 200
    assert max(len(response) for response, _ in PAIRS) >= 3000


@pytest.mark.parametrize(("metric", "reference"), [("em", squad_em), ("f1", squad_f1), ("match", contains)])
def test_em_f1_and_match_are_the_references_of_composed_text_that_leaves_something(metric, reference):
    """The score is the reference's on the NFKC forms, unless nothing is left of the gold answer."""
    compared = 0
    for response, answer in PAIRS:
        if not leaves_nothing(answer):
            compared += 1
            assert METRICS[metric](response, [answer]) == pytest.approx(reference(composed(response), composed(answer)), abs=1e-6), (response, answer)
    assert compared > 4500


@pytest.mark.parametrize(("metric", "reference"), [("em", squad_em), ("f1", squad_f1), ("match", contains)])
def test_the_references_differ_on_two_kinds_of_pairs_alone(metric, reference):
    """On unchanged texts, the reference differs only in two cases.

    1. NFKC changes one of the two texts, or one of them has a typographic quote or dash. For the reference, "é" in one code point is
       another letter than "é" in two, "ﬁve" another word than "five", and "it’s" another one than "it's". A reader sees the same
       text, and the editor in which it was typed would decide the score.
    2. The gold answer has only articles and punctuation. By the reference's em, "the" equals "a", "?" and an empty answer. By its
       match, every response holds the answer. By its f1, "A" against "A" is 0. The project's metrics compare the words themselves.
    """
    differing = {1: 0, 2: 0}
    for response, answer in PAIRS:
        if METRICS[metric](response, [answer]) != pytest.approx(reference(response, answer), abs=1e-6):
            kind = 2 if leaves_nothing(answer) else 1
            differing[kind] += 1
            assert kind == 2 or (composed(response), composed(answer)) != (response, answer), (response, answer)
    assert min(differing.values()) > 20, "both kinds occur"


def test_texts_of_articles_and_punctuation_are_compared_as_they_are():
    """All pairs of the second case: the score is 1 for the same words, or for the same marks if there are no words. Otherwise it is 0."""
    both = [pair for pair in PAIRS if all(map(leaves_nothing, pair)) and all(text.strip() for text in pair)]
    same = [as_it_reads(response) == as_it_reads(answer) for response, answer in both]
    assert 100 < sum(same) < len(same) - 100
    for (response, answer), equal in zip(both, same, strict=True):
        assert metrics.exact_match(response, [answer]) == equal, (response, answer)
        assert squad_em(composed(response), composed(answer)) == 1 and squad_f1(composed(response), composed(answer)) == 0
        assert metrics.match(response, [answer]) >= equal
        assert metrics.token_f1(response, [answer]) == 1 or not equal
    for response in ("", " ", "\n"):
        assert metrics.exact_match(response, ["the"]) == 0 == metrics.match(response, ["..."]), "no answer is not right"
        assert squad_em(response, "the") == 1 == contains(response, "...")
    assert metrics.match("the", ["he"]) == 0 == contains("the", "he")


def test_several_answers_are_the_best_of_each():
    rng = random.Random(12)
    for _ in range(1000):
        (response, _), *others = rng.choices(PAIRS, k=rng.randint(2, 5))
        answers = [answer for _, answer in others if not leaves_nothing(answer)]
        if not answers:
            continue
        for metric, reference in (("em", squad_em), ("f1", squad_f1), ("match", contains)):
            expected = max(reference(composed(response), composed(answer)) for answer in answers)
            assert METRICS[metric](response, answers) == pytest.approx(expected, abs=1e-6)


def test_str_em_is_alces():
    """The scores differ only if a reading has no short answer with text. ALCE counts such a reading as found (blank) or missed (no answer)."""
    rng, compared = random.Random(13), 0
    for _ in range(4000):
        readings = [[composed(answer) for _, answer in rng.choices(PAIRS, k=rng.randint(1, 3))] for _ in range(rng.randint(1, 4))]
        said = [rng.choice(reading) for reading in readings if rng.random() < 0.5]
        response = composed(" and ".join([*said, rng.choice(SHORT)]))
        row = {"qa_pairs": [{"short_answers": reading} for reading in readings]}
        if not any(leaves_nothing(answer) for reading in readings for answer in reading):
            compared += 1
            assert score_row("str_em", response, row) == pytest.approx(alce_str_em(response, readings), abs=1e-6), (response, readings)
        kept = [[answer for answer in reading if not leaves_nothing(answer)] for reading in readings]
        if all(kept):
            more = {"qa_pairs": [*({"short_answers": [*reading, " "]} for reading in kept), {"short_answers": []}, {"short_answers": ["", "\n"]}]}
            assert score_row("str_em", response, more) == pytest.approx(alce_str_em(response, kept), abs=1e-6)
    assert compared > 1000


# ---------------------------------------------------------------- accuracy


def starts_with_label(response: str, answer: str) -> float:
    """Whether the response begins with the words of the label, apart from letter case, punctuation and the form of marks. An empty label does not count."""
    response, answer = (re.sub(rf"[{re.escape(string.punctuation)}]+", "", composed(text)).lower() for text in (response, answer))
    response, answer = (re.sub(r"\s+", " ", text).strip() for text in (response, answer))
    return float(answer != "" and f"{response} ".startswith(f"{answer} "))


def test_accuracy_is_whether_the_response_begins_with_the_label():
    labels = ["SUPPORTS", "REFUTES", "NOT SURE", "the", "not", "Supports.", "half-true", "...", "", "yes", "no", "不"]  # not a label of a choice
    rng = random.Random(14)
    pairs = [(response, label) for response in [*AWKWARD, *labels] for label in labels]
    for _ in range(1500):
        label = rng.choice(labels)
        pairs.append((f"{mutate(rng, label)}{rng.choice(['', ' ', '. ', ', '])}{rng.choice(SHORT)}", rng.choice([label, label, rng.choice(labels)])))
    assert len(pairs) > 2000
    found = [metrics.accuracy(response, [label]) for response, label in pairs]
    assert found == [starts_with_label(response, label) for response, label in pairs]
    assert 300 < sum(found) < len(found) - 300
    for (response, one), (_, other) in itertools.pairwise(pairs):
        assert metrics.accuracy(response, [one, other]) == max(starts_with_label(response, one), starts_with_label(response, other))


# ---------------------------------------------------------------- ROUGE: rouge-score called plainly


@pytest.fixture(scope="module")
def scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)


def rouge_scores_own(answer: str) -> bool:
    """Whether rouge-score reads every letter of the answer."""
    return not any(character.isalpha() and not character.isascii() for character in answer)


def test_rouge_is_rouge_scores(scorer):
    pairs = [pair for pair in make_pairs(15, 5000, 800) if rouge_scores_own(pair[1])]
    assert len(pairs) > 2500
    scores = []
    for response, answer in pairs:
        scores.append(metrics.rouge_l(response, [answer]))
        assert scores[-1] == pytest.approx(scorer.score(answer, response)["rougeL"].fmeasure, abs=1e-6), (response, answer)
    assert sum(score == 1 for score in scores) > 300 and sum(0 < score < 1 for score in scores) > 300 and sum(score == 0 for score in scores) > 300


def test_rouge_of_several_answers_is_rouge_scores_best(scorer):
    rng, pairs = random.Random(16), [pair for pair in make_pairs(16, 2000, 300) if rouge_scores_own(pair[1])]
    for response, _ in pairs:
        answers = [answer for _, answer in rng.choices(pairs, k=3)]
        assert metrics.rouge_l(response, answers) == pytest.approx(scorer.score_multi(answers, response)["rougeL"].fmeasure, abs=1e-6)


def test_rouge_lsum_is_rouge_scores_over_our_sentences(scorer):
    """For rouge-score a line is a sentence. The lines are those of metrics.split_sentences."""
    for response, answer in make_pairs(17, 3000, 600):
        if rouge_scores_own(answer):
            lines = metrics.split_sentences(answer), metrics.split_sentences(response)
            assert metrics.rouge_lsum(response, [answer]) == pytest.approx(scorer.score(*lines)["rougeLsum"].fmeasure, abs=1e-6), (response, answer)


def test_rouge_lsum_is_rouge_scores_over_sentences_known_beforehand(scorer):
    """Here the sentences are joined into a paragraph, which the metric has to split again."""
    rng = random.Random(18)
    words = "rivers river running mountain mountains blue climate seven cafe 42 exports imports population generously".split()
    different = 0
    for _ in range(1000):
        sides = [[" ".join(rng.choices(words, k=rng.randint(2, 7))).capitalize() + rng.choice(".!?") for _ in range(rng.randint(1, 5))] for _ in range(2)]
        response, answer = (" ".join(side) for side in sides)
        expected = scorer.score("\n".join(sides[1]), "\n".join(sides[0]))
        assert metrics.rouge_lsum(response, [answer]) == pytest.approx(expected["rougeLsum"].fmeasure, abs=1e-6), sides
        different += expected["rougeLsum"].fmeasure != expected["rougeL"].fmeasure
    assert different > 500, "over one sentence both are the same"


# ---------------------------------------------------------------- ROUGE of texts that rouge-score does not read


UNSPACED = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def any_words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and marks, stemmed if they are English. In scripts without spaces, a word is a character with its marks."""
    words, run = [], ""
    for character in composed(text).lower():
        kind = unicodedata.category(character)[0]
        unspaced = unicodedata.name(character, "").startswith(UNSPACED) and kind in "LNM" and "SOUND MARK" not in unicodedata.name(character)
        if kind == "M" and words and not run and words[-1] != "":
            words[-1] += character
        elif unspaced:
            words += [run, character]
            run = ""
        elif kind in "LNM":
            run += character
        else:
            words += [run, ""]
            run = ""
    stem = PorterStemmer().stem
    return [stem(word) if word.isascii() and len(word) > 3 else word for word in [*words, run] if word]


def plain_rouge_l(response: str, answer: str) -> float:
    """2 LCS / (response words + answer words), which is F1 of LCS precision and recall."""
    given, gold = any_words(response), any_words(answer)
    lengths = [0] * (len(gold) + 1)
    for word in given:
        row = [0]
        for place, other in enumerate(gold):
            row.append(lengths[place] + 1 if word == other else max(lengths[place + 1], row[-1]))
        lengths = row
    return 2 * lengths[-1] / (len(given) + len(gold)) if given and gold else 0.0


def test_rouge_of_other_letters_is_a_plain_implementation_over_their_words():
    rng = random.Random(19)
    pieces = [
        "北京", "是", "中国的首都", "東京", "カタカナ", "ひらがな", "Столица", "России", "Москва", "กรุงเทพ", "ประเทศไทย", "العاصمة", "الرياض", "राजधानी", "दिल्ली", "서울은", "수도",
        "αθήνα", "Łódź", "São", "Tomé", "running", "runs", "capitals", "the", "1989", "café",
    ]
    scores = []
    for _ in range(1500):
        answer = rng.choice([" ", ", ", "—", "。"]).join(rng.choices(pieces, k=rng.randint(1, 7)))
        response = mutate(rng, answer) if rng.random() < 0.6 else " ".join(rng.choices(pieces, k=rng.randint(1, 7)))
        if not rouge_scores_own(answer):
            scores.append(metrics.rouge_l(response, [answer]))
            assert scores[-1] == pytest.approx(plain_rouge_l(response, answer), abs=1e-6), (response, answer)
    assert sum(score == 1 for score in scores) > 100 and sum(0 < score < 1 for score in scores) > 300 and sum(score == 0 for score in scores) > 30


@pytest.mark.parametrize("text", ["北京是中国的首都。", "Столица России — Москва.", "กรุงเทพ", "ありがとう", "서울", "مرحبا بالعالم", "नमस्ते", "Ελλάδα", "שלום", "é", "Ⅻ世"])
def test_a_response_equal_to_its_answer_is_right_in_any_script(text):
    for metric in METRICS:
        assert METRICS[metric](text, [text]) == 1, metric
        assert METRICS[metric]("something else", [text]) == 0, metric


def test_sentences_end_at_the_full_stops_of_other_scripts():
    """Two sentences in the other order are the same two sentences."""
    assert metrics.rouge_lsum("东京在日本。北京在中国。", ["北京在中国。东京在日本。"]) == 1 > metrics.rouge_l("东京在日本。北京在中国。", ["北京在中国。东京在日本。"])
    assert metrics.split_sentences("One. 北京。东京！ यह है। वह है। (End.) 3。") == "One.\n北京。\n东京！\nयह है।\nवह है।\n(End.)\n3。"
