"""Create questions of eight kinds from the Factbook passages, each with the passages it needs and a proof of its
answer.

Kinds: none (arithmetic, common knowledge), one (a fact), two (a comparison), bridge (two hops), many (three or more),
verify (a claim), long (a paragraph), ambiguous (several readings). Reads the passages of corpus.py. Writes train.jsonl
(for the pipeline), reranker.jsonl (the same countries with other questions, to train a cross-encoder; `held_out` marks
those of one tenth of the countries) and test.jsonl (other countries). With --dev, dev.jsonl has questions about that
tenth, and train.jsonl has none. proof.py checks every row before anything is written.

    python examples/factbook/questions.py --passages data/factbook/passages.jsonl --output_dir data/factbook
"""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from facts import NOT_COUNTRIES, Fact, is_clean, normalise, number, read_facts, segments
from proof import JOINT, NUMBER_WORDS, check, enumerate_words

from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.stage import ArgumentParser, UserError, derive_seed, log, run

WEIGHTS = {"one": 30, "two": 14, "bridge": 12, "many": 12, "none": 10, "verify": 10, "long": 6, "ambiguous": 6}
DATASETS = {"verify": "factbook_verify", "long": "factbook_long", "ambiguous": "factbook_ambiguous"}
TEST_SHARE, HELD_OUT_SHARE = 0.2, 0.1
ARTICLE = re.compile(
    r"(?:Islands|Republic|Kingdom|States|Emirates|Netherlands|Philippines|Maldives|Comoros|Strip|Bank|Refuges|Territory|Lands)$"
    r"|^(?:Isle|Republic|Democratic Republic) "
)
# Number of consecutive failed attempts after which a kind counts as exhausted.
PATIENCE = 5000

ONE = (
    "What is {noun} of {c}{when}?", "Tell me {noun} of {c}{when}.", "For {c}, what is {noun}{when}?",
    "Can you say what {noun} of {c} is{when}?", "I am looking for {noun} of {c}{when}.",
    "What does the Factbook give as {noun} of {c}{when}?", "Name {noun} of {c}{when}.",
    "{c}: what is {noun}{when}?", "Do you know {noun} of {c}{when}?", "State {noun} of {c}{when}.",
)
TWO = (
    "Which has the {more} {bare}{when}, {a} or {b}?", "Which country has the {more} {bare}{when}: {a} or {b}?",
    "Between {a} and {b}, which one has the {more} {bare}{when}?", "{a} or {b}: which has the {more} {bare}{when}?",
    "Is the {bare}{when} {more} in {a} or in {b}?", "Of {a} and {b}, which has the {more} {bare}{when}?",
    "Compare {a} and {b}: where is the {bare} {more}{when}?", "Tell me whether {a} or {b} has the {more} {bare}{when}.",
)
# Both steps are named, so that one search can find the passages of both.
BRIDGE = (
    "{x} is {hook} of which country, and what is its {bare}{when}?", "Of which country is {x} {hook}, and what is its {bare}{when}?",
    "Which country has {x} as {hook}, and what is its {bare}{when}?", "Find the country that has {x} as {hook}, and give its {bare}{when}.",
    "{x} is {hook} of a country. Which one is it, and what is its {bare}{when}?",
    "Take the country that has {x} as {hook}: which one is it, and what is its {bare}{when}?",
    "If {x} is {hook} of a country, which country is it and what is its {bare}{when}?",
    "{x} -- of which country is it {hook}, and what is its {bare}{when}?",
)
HOOKS = ("capital", "adjective", "demonym", "currency", "local_name")
# A nationality or currency usually resembles its country's name. A capital or local name that does would reveal the
# country.
TELLING_HOOKS = ("capital", "local_name")
MOST = (
    "Which of {names} has the {most} {bare}{when}?", "Of {names}, which has the {most} {bare}{when}?",
    "Among {names}, where is the {bare} {most}{when}?", "{choices}: which has the {most} {bare}{when}?",
    "Which country has the {most} {bare}{when}: {choices}?",
)
LISTS = (
    "List the {plural} of {names}.", "What are the {plural} of {names}?", "Name the {plural} of {names}, in this order.",
    "Give me the {plural} of {names}.",
)
COUNTS = (
    "In how many of {names} is the {bare} above {bound}{when}?", "How many of {names} have a {bare} above {bound}{when}?",
    "Count those of {names} where the {bare} is above {bound}{when}.",
)
CLAIMS = (
    "{Noun} of {c}{when} is {v}.", "It is true that {noun} of {c}{when} is {v}.", "In {c}, {noun}{when} is {v}.",
    "For {c}, the Factbook gives {v} as {noun}{when}.", "{v} is {noun} of {c}{when}.", "Claim: {noun} of {c}{when} is {v}.",
    "{c} has {v} as {noun}{when}.", "The records of {c} state that {noun}{when} is {v}.",
)
# The Factbook has no such facts, so that no passage decides these claims.
UNSTATED = (
    "The national football team of {c} was founded in {y}.", "The oldest bakery in {c} opened in {y}.",
    "The tallest building of {c} has {n} floors.", "The national library of {c} holds {n} thousand manuscripts.",
    "The most popular novel in {c} was published in {y}.", "A chess grandmaster from {c} won a world title in {y}.",
    "The largest cinema of {c} has {n} seats.", "The first tram in {c} ran in {y}.",
    "The longest marriage on record in {c} lasted {n} years.", "The national orchestra of {c} has {n} musicians.",
)
LONG = (
    "Describe {topic} of {c}.", "Write a paragraph about {topic} of {c}.", "What should I know about {topic} of {c}?",
    "Tell me in some detail about {topic} of {c}.", "Give an account of {topic} of {c}.",
    "Explain {topic} of {c} in a paragraph.", "How would you describe {topic} of {c}?", "Summarize {topic} of {c}.",
)
TOPICS = {
    "Background": "the historical background", "Economic overview": "the economy", "Climate": "the climate",
    "Terrain": "the terrain", "Population distribution": "the population distribution", "Flag": "the flag",
    "Natural hazards": "the natural hazards", "Geography - note": "the special geography",
    "Broadcast media": "the broadcast media", "Environmental issues": "the environmental issues",
    "Space program overview": "the space program", "Location": "the geographic location",
    "Natural resources": "the natural resources", "Agricultural products": "the agricultural products",
    "Industries": "the industries", "Ethnic groups": "the ethnic groups", "Religions": "the religions",
    "Military service age and obligation": "the military service age and obligation", "Military - note": "the military",
}
AMBIGUOUS = (
    "What is {thing} of {c}?", "Tell me {thing} of {c}.", "I would like to know {thing} of {c}.", "{c}: what is {thing}?",
    "Can you give {thing} of {c}?", "What do we know of {thing} of {c}?", "State {thing} of {c}.", "What about {thing} of {c}?",
)
READINGS = (
    ("the size", "area", "land_area"), ("the number of inhabitants", "population", "men", "women"),
    ("the life expectancy", "life", "life_men", "life_women"), ("the median age", "median_age", "median_age_men", "median_age_women"),
    ("the leader", "chief", "head"), ("the name", "long_name", "local_name"), ("the extreme point", "peak", "low_point"),
    ("the biggest trading partner", "export_partner", "import_partner"), ("the top traded good", "export_good", "import_good"),
    ("the inflation rate", "inflation 2024", "inflation 2023", "inflation 2022"), ("the budget", "revenue", "spending"),
    ("the unemployment rate", "unemployment 2024", "unemployment 2023", "unemployment 2022"),
    ("the GDP", "gdp 2023", "gdp_nominal 2024", "gdp_nominal 2023"), ("the trade volume in 2023", "exports 2023", "imports 2023"),
    ("the number of telephones", "phones", "landlines"), ("the word for the nationality", "demonym", "adjective"),
    ("the electric power", "power_plants", "power_use"), ("the number of airfields", "airports", "heliports"),
)
ARITHMETIC = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?", "What is the sum of {a} and {b}?"),
    "-": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "How much is {a} - {b}?"),
    "*": ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
    "/": ("What is {a} divided by {b}?", "How often does {b} go into {a}?"),
}
CONVERSIONS = (
    ("How many days are in {n} weeks?", 7), ("How many minutes are in {n} hours?", 60), ("How many months are in {n} years?", 12),
    ("How many eggs are in {n} dozen?", 12), ("How many legs do {n} horses have?", 4), ("How many centimeters are in {n} meters?", 100),
    ("How many hours are in {n} days?", 24), ("How many wheels do {n} bicycles have?", 2), ("How many sides do {n} triangles have?", 3),
    ("How many legs do {n} spiders have?", 8), ("How many legs do {n} beetles have?", 6), ("How many corners do {n} cubes have?", 8),
)
COMMON = (
    ("Which day comes after Monday?", "Tuesday"), ("Which day comes before Sunday?", "Saturday"), ("Which month comes after March?", "April"),
    ("Which month comes before December?", "November"), ("What is the opposite of hot?", "cold"), ("What is the opposite of up?", "down"),
    ("Which letter follows B in the alphabet?", "C"), ("What color do blue and yellow make?", "green"), ("What color do red and white make?", "pink"),
    ("What is frozen water called?", "ice"), ("What is the plural of mouse?", "mice"), ("What is the plural of child?", "children"),
    ("What is the past tense of go?", "went"), ("What is the past tense of sing?", "sang"), ("Which animal says meow?", "cat"),
    ("Which animal barks?", "dog"), ("What is the young of a cow called?", "calf"), ("What is the young of a sheep called?", "lamb"),
    ("Which sense do we use our ears for?", "hearing"), ("Which organ pumps the blood?", "heart"), ("What do bees make?", "honey"),
    ("Which planet do we live on?", "Earth"), ("Which star is closest to the Earth?", "Sun"), ("What shape has three sides?", "triangle"),
    ("What shape is a ball?", "sphere"), ("How many letters has the English alphabet?", "26"), ("How many continents are there?", "seven"),
    ("How many players has a soccer team on the field?", "eleven"), ("How many strings has a violin?", "four"), ("What gas do we breathe to live?", "oxygen"),
)
PHRASINGS = {
    "one": ONE, "two": TWO, "bridge": BRIDGE, "many": MOST + LISTS + COUNTS, "verify": CLAIMS + UNSTATED, "long": LONG,
    "ambiguous": AMBIGUOUS, "none": tuple(form for forms in ARITHMETIC.values() for form in forms) + tuple(form for form, _ in CONVERSIONS),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="passages written by corpus.py")
    group.add_argument("--output_dir", default="data/factbook",
                       help="folder of train.jsonl, reranker.jsonl and test.jsonl")
    group.add_argument("--exclude", nargs="+", default=[],
                       metavar="FILE", help="files of questions that must not occur again, nor in other words")
    group = parser.add_argument_group("sizes")
    group.add_argument("--train", type=int, default=500, help="number of questions for the pipeline")
    group.add_argument("--reranker", type=int, default=800, help="number of questions for training the cross-encoder")
    group.add_argument("--test", type=int, default=120,
                       help="number of questions about countries that the others never mention")
    group.add_argument("--dev", type=int, default=0,
                       help="number of development questions, about a tenth of the other countries, which train.jsonl then omits")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return parser.parse_args(argv)


class Pool:
    """The facts available to the questions of one file, and the questions already drawn for any file."""

    def __init__(self, facts: dict[str, dict[str, Fact]], paragraphs: dict, used: set, unique: set, rng: random.Random):
        self.facts, self.paragraphs = facts, paragraphs
        self.used, self.unique, self.rng = used, unique, rng
        self.countries = sorted(facts)
        self.holders = defaultdict(list)
        for country in self.countries:
            for key in facts[country]:
                self.holders[key].append(country)
        # Every field is equally likely, however many years it has.
        by_field = defaultdict(list)
        for key in sorted(self.holders):
            by_field[key.split()[0]].append(key)
        self.keys = [keys for _, keys in sorted(by_field.items())]
        self.keys_of = {
            country: [mine for keys in self.keys if (mine := [key for key in keys if key in known])]
            for country, known in facts.items()
        }

    def fact(self, country: str) -> Fact:
        return self.facts[country][self.rng.choice(self.rng.choice(self.keys_of[country]))]

    def comparable(self, count: int, wanted) -> list[Fact]:
        """Return the facts of several countries for one field that `wanted` accepts; [] if too few countries have it."""
        key = self.rng.choice(self.rng.choice(self.keys))
        if not wanted(self.facts[self.holders[key][0]][key].field) or len(self.holders[key]) < count:
            return []
        return [self.facts[country][key] for country in self.rng.sample(self.holders[key], count)]


def cap(text: str) -> str:
    return text[0].upper() + text[1:]


def named(country: str) -> str:
    """Return a country's name for use within a sentence: "the Netherlands"."""
    return f"the {country}" if ARTICLE.search(country) else country


def bare(noun: str) -> str:
    return noun.removeprefix("the ")


def draft(kind: str, mark: tuple, question: str, answers: list[str], facts: list[Fact], rule: str) -> dict:
    """Return a question without its id.

    `mark` identifies its content independently of the wording, to avoid repetitions.
    """
    return {
        "mark": (kind, *mark), "dataset": DATASETS.get(kind, "factbook"), "kind": kind, "question": cap(question), "answers": answers,
        "gold_docs": [fact.passage for fact in facts], "evidence": [fact.evidence for fact in facts],
        "values": [fact.value for fact in facts], "rule": rule,
    }


def spread(facts: list[Fact]) -> bool:
    """Return whether neighbouring values differ by at least one twentieth, which is more than rounding."""
    numbers = sorted(number(fact.value) for fact in facts)
    return all(high - low > 0.05 * max(abs(high), abs(low)) for low, high in pairwise(numbers))


def with_folded(fact: Fact) -> list[str]:
    """Return a country as an answer: in the Factbook's spelling, and without accents."""
    return list(dict.fromkeys([fact.country, fact.country.replace("ô", "o")]))


def make_none(pool: Pool) -> dict:
    rng = pool.rng
    choice = rng.random()
    if choice < 0.05:
        question, answer = rng.choice(COMMON)
        row = draft("none", (question,), question, [answer], [], "known")
    elif choice < 0.3:
        form, factor = rng.choice(CONVERSIONS)
        count = rng.randint(2, 60)
        row = draft("none", (form, count), form.format(n=count), [str(count * factor)], [], f"arithmetic {count} * {factor}")
    else:
        sign = rng.choice("+-*/")
        a, b = rng.randint(2, 99), rng.randint(2, 99 if sign in "+-" else 12)
        a, b = (a * b, b) if sign == "/" else (max(a, b), min(a, b))
        answer = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        row = draft("none", (a, sign, b), rng.choice(ARITHMETIC[sign]).format(a=a, b=b), [str(answer)], [], f"arithmetic {a} {sign} {b}")
    return row


def make_one(pool: Pool) -> dict | None:
    country = pool.rng.choice(pool.countries)
    fact = pool.fact(country)
    form = pool.rng.choice(fact.field.asks if fact.field.asks and pool.rng.random() < 0.4 else ONE)
    question = form.format(noun=fact.noun, c=named(country), when=fact.when, year=fact.year)
    if normalise(fact.value) in normalise(question):
        return None
    return draft("one", (country, fact.key), question, fact.answers, [fact], "value")


def make_two(pool: Pool) -> dict | None:
    facts = pool.comparable(2, lambda field: field.scale)
    if not facts or not spread(facts):
        return None
    is_most = pool.rng.random() < 0.6
    best = (max if is_most else min)(facts, key=lambda fact: number(fact.value))
    first, second = facts
    question = pool.rng.choice(TWO).format(
        more=first.field.scale[0 if is_most else 1], bare=bare(first.noun), when=first.when, a=named(first.country), b=named(second.country))
    mark = (first.key, *sorted((first.country, second.country)))
    return draft("two", mark, question, with_folded(best), facts, "largest" if is_most else "smallest")


def make_bridge(pool: Pool) -> dict | None:
    country = pool.rng.choice(pool.countries)
    hooks = [key for key in HOOKS if (country, key) in pool.unique]
    if not hooks:
        return None
    hook, fact = pool.facts[country][pool.rng.choice(hooks)], pool.fact(country)
    if hook.passage == fact.passage or fact.value == hook.value or country.lower() in fact.value.lower():
        return None
    question = pool.rng.choice(BRIDGE).format(x=hook.value, hook=hook.noun, bare=bare(fact.noun), when=fact.when)
    return draft("bridge", (country, hook.key, fact.key), question, fact.answers, [hook, fact], "value")


def make_many(pool: Pool) -> dict | None:
    choice = pool.rng.random()
    count = pool.rng.choice((3, 3, 3, 4)) if choice < 0.7 else 3
    facts = pool.comparable(count, lambda field: field.plural if choice >= 0.7 else field.scale)
    if not facts:
        return None
    first, countries = facts[0], [fact.country for fact in facts]
    places = [named(country) for country in countries]
    mark = (first.key, *sorted(countries))
    if choice >= 0.7:
        values = [fact.value for fact in facts]
        answers = [enumerate_words(values), ", ".join(values)]
        question = pool.rng.choice(LISTS).format(plural=first.field.plural, names=enumerate_words(places))
        return draft("many", mark, question, answers, facts, "list") if is_clean(answers[0]) else None
    if not spread(facts):
        return None
    if choice < 0.5:
        is_most = choice < 0.3
        best = (max if is_most else min)(facts, key=lambda fact: number(fact.value))
        question = pool.rng.choice(MOST).format(
            names=enumerate_words(places), choices=enumerate_words(places, "or"), most=first.field.scale[2 if is_most else 3], bare=bare(first.noun), when=first.when)
        return draft("many", mark, question, with_folded(best), facts, "largest" if is_most else "smallest")
    numbers = sorted(number(fact.value) for fact in facts)
    at = pool.rng.randrange(count - 1)
    bound = bound_between(numbers[at], numbers[at + 1], first.value)
    if bound is None:
        return None
    question = pool.rng.choice(COUNTS).format(names=enumerate_words(places), bare=bare(first.noun), when=first.when, bound=bound)
    above = sum(value > number(bound) for value in numbers)
    return draft("many", mark, question, [NUMBER_WORDS[above], str(above)], facts, f"above {bound}")


def bound_between(low: float, high: float, like: str) -> str | None:
    """Return a round number between two others, written like the value `like`; None if there is none."""
    middle = float(f"{(low + high) / 2:.2g}")
    scale, word = next(((size, f" {name}") for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))
                        if abs(middle) >= size), (1, ""))
    unit = "" if like[0] == "$" else like.lstrip("-0123456789.,").removeprefix(" million").removeprefix(" billion").removeprefix(" trillion")
    bound = f"{'$' if like[0] == '$' else ''}{middle / scale:,.10g}{word}{unit}"
    return bound if low < number(bound) < high else None


def make_verify(pool: Pool) -> dict | None:
    rng = pool.rng
    country = rng.choice(pool.countries)
    choice = rng.random()
    if choice < 0.2:
        form = rng.choice(UNSTATED)
        question = form.format(c=named(country), y=rng.randint(1850, 2015), n=rng.randint(12, 400))
        return draft("verify", (country, form), question, ["NOT ENOUGH INFO"], [], "unstated")
    fact = pool.fact(country)
    claimed = fact.value
    if choice >= 0.6:
        other = pool.facts[rng.choice(pool.holders[fact.key])][fact.key]
        claimed = other.value
        if normalise(claimed) in map(normalise, fact.answers) or (fact.field.scale and not spread([fact, other])):
            return None
        # "Parliament" instead of "National Parliament" is not clearly wrong.
        if not fact.field.scale and set(normalise(claimed).split()) & set(normalise(" ".join(fact.answers)).split()):
            return None
    question = rng.choice(CLAIMS).format(Noun=cap(fact.noun), noun=fact.noun, c=named(country), when=fact.when, v=claimed)
    answer = "SUPPORTS" if claimed == fact.value else "REFUTES"
    return draft("verify", (country, fact.key), question, [answer], [fact], f"claim {claimed}")


def make_long(pool: Pool) -> dict | None:
    country = pool.rng.choice(pool.countries)
    if not pool.paragraphs.get(country):
        return None
    name, parts = pool.rng.choice(sorted(pool.paragraphs[country].items()))
    question = pool.rng.choice(LONG).format(topic=TOPICS[name], c=named(country))
    values = [body for _, body, _ in parts]
    answer = "".join(value + (" " if value[-1] in ".!?;" else "; ") for value in values).rstrip(" ;")
    row = draft("long", (country, name), question, [cap(answer)], [], "paragraph")
    return row | {"gold_docs": [doc for doc, _, _ in parts], "evidence": [evidence for _, _, evidence in parts], "values": values}


def make_ambiguous(pool: Pool) -> dict | None:
    country = pool.rng.choice(pool.countries)
    thing, *keys = pool.rng.choice(READINGS)
    facts = [pool.facts[country][key] for key in keys if key in pool.facts[country]]
    if len({normalise(fact.value) for fact in facts}) < max(2, len(facts)):
        return None
    question = pool.rng.choice(AMBIGUOUS).format(thing=thing, c=named(country))
    passages = list(dict.fromkeys(fact.passage for fact in facts))
    facts.sort(key=lambda fact: passages.index(fact.passage))
    answer = "; ".join(f"{bare(fact.noun)}{fact.when}: {fact.value}" for fact in facts)
    row = draft("ambiguous", (country, thing), question, [cap(answer)], [], "pairs")
    return row | {
        "gold_docs": passages, "values": [fact.value for fact in facts],
        "evidence": [JOINT.join(fact.evidence for fact in facts if fact.passage == passage) for passage in passages],
        "qa_pairs": [{"question": ONE[0].format(noun=fact.noun, c=named(country), when=fact.when), "short_answers": fact.answers} for fact in facts],
    }


MAKERS = {"one": make_one, "two": make_two, "bridge": make_bridge, "many": make_many, "none": make_none,
          "verify": make_verify, "long": make_long, "ambiguous": make_ambiguous}


def content(row: dict) -> tuple:
    """Return what a written question asks, independently of the wording: its kind and facts, or else its sum or its text."""
    facts = frozenset(zip(row.get("gold_docs", ()), row.get("evidence", ()), strict=False))
    rule = row.get("rule", "")
    return row.get("kind"), facts or (rule if rule.startswith("arithmetic") else row["question"].lower())


def draw(pool: Pool, size: int) -> list[dict]:
    """Return `size` new questions, with the kinds in proportion to their weights."""
    rows = []
    total = sum(WEIGHTS.values())
    exact = {kind: size * weight / total for kind, weight in WEIGHTS.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[:size - sum(counts.values())]:
        counts[kind] += 1
    for kind, count in counts.items():
        fruitless = 0
        while count:
            row = MAKERS[kind](pool)
            if row is None or not pool.used.isdisjoint((row["mark"], row["question"].lower(), content(row))):
                fruitless += 1
                if fruitless > PATIENCE:
                    raise UserError(f"--passages: give no more questions of the kind {kind!r} ({count} are missing); reduce --train, --reranker, "
                                    "--dev or --test")
                continue
            fruitless = 0
            pool.used.update((row.pop("mark"), row["question"].lower()))
            rows.append(row)
            count -= 1
    pool.rng.shuffle(rows)
    return rows


def find_unique(facts: dict[str, dict[str, Fact]]) -> set[tuple[str, str]]:
    """Return the (country, hook) pairs whose value identifies the country without naming it."""
    owners = defaultdict(set)
    for country, known in facts.items():
        for key in HOOKS:
            if key in known:
                owners[key, normalise(known[key].value)].add(country)
    return {
        (country, key) for (key, value), (country, *others) in owners.items()
        if not others and (key not in TELLING_HOOKS or (normalise(country) not in value and value not in normalise(country)))
    }


def find_paragraphs(passages: list[dict]) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    """Return country -> field -> [(passage, body, evidence)], for fields of TOPICS that form a paragraph in at most three passages."""
    found = defaultdict(lambda: defaultdict(list))
    for passage in passages:
        country = passage["title"].rpartition(": ")[0]
        for segment in segments(passage["text"]):
            name, _, body = segment.partition(": ")
            body = body.removeprefix("description: ").strip()
            if name in TOPICS and country not in NOT_COUNTRIES:
                found[country][name].append((passage["id"], body, segment))
    usable = defaultdict(dict)
    for country, fields in found.items():
        for name, parts in fields.items():
            words = sum(len(body.split()) for _, body, _ in parts)
            documents = {doc for doc, _, _ in parts}
            clean = all(body and "note:" not in body and JOINT not in body for _, body, _ in parts)
            if len(documents) == len(parts) <= 3 and 15 <= words <= 100 and clean:
                usable[country][name] = parts
    return usable


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    passages = [passage for _, passage in read_json(args.passages)]
    facts = read_facts(passages)
    unique, paragraphs = find_unique(facts), find_paragraphs(passages)
    used = {key for path in args.exclude for _, row in read_json(path) for key in (row["question"].lower(), content(row))}
    countries = sorted(facts)
    random.Random(derive_seed(args.seed, "countries")).shuffle(countries)
    tests = int(len(countries) * TEST_SHARE)
    held_out = tests + int((len(countries) - tests) * HELD_OUT_SHARE)

    def make(name: str, chosen: list[str], size: int) -> list[dict]:
        chosen_facts = {country: facts[country] for country in sorted(chosen)}
        rng = random.Random(derive_seed(args.seed, name))
        return draw(Pool(chosen_facts, paragraphs, used, unique, rng), size)

    held = int(args.reranker * HELD_OUT_SHARE)
    files = {
        "test": make("test", countries[:tests], args.test),
        **({"dev": make("dev", countries[tests:held_out], args.dev)} if args.dev else {}),
        "train": make("train", countries[held_out if args.dev else tests:], args.train),
        "reranker": [row | {"held_out": True} for row in make("held_out", countries[tests:held_out], held)]
        + [row | {"held_out": False} for row in make("reranker", countries[held_out:], args.reranker - held)],
    }
    numbers = defaultdict(int)
    for rows in files.values():
        for at, row in enumerate(rows):
            numbers[row["kind"]] += 1
            rows[at] = {"id": f"factbook_{row['kind']}_{numbers[row['kind']]}", **row}
    check([row for rows in files.values() for row in rows], passages)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_json(folder / f"{name}.jsonl", rows)
        kinds = ", ".join(f"{kind} {sum(row['kind'] == kind for row in rows)}" for kind in WEIGHTS)
        log.info("%s: %d questions, proved (%s)", folder / f"{name}.jsonl", len(rows), kinds)


if __name__ == "__main__":
    run(main)
