"""Extract single facts from the Factbook passages: the value, the passage, and the exact text that states it.

Imported by questions.py. A fact is kept only if it is clean: the value has the form of the field (no ranges, no "NA",
no sentence), it is short, and exactly one passage of the country has the field.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# A longer value is a description, not an answer.
MAX_ANSWER_WORDS = 6
LARGE, LONG, HIGH, MANY = (
    ("larger", "smaller", "largest", "smallest"), ("greater", "smaller", "greatest", "smallest"),
    ("higher", "lower", "highest", "lowest"), ("higher", "lower", "highest", "lowest"),
)
# Abbreviations in the lists of trading partners.
SHORT_NAMES = {
    "USA": "United States", "UK": "United Kingdom", "UAE": "United Arab Emirates", "NZ": "New Zealand",
    "DRC": "Democratic Republic of the Congo",
}
# Entries that are not countries, or whose figures include those of other entries.
NOT_COUNTRIES = {"World", "European Union", "Antarctica"}


@dataclass(frozen=True)
class Field:
    """One kind of fact. `noun` completes "What is <noun> of France?"; for a yearly field it ends with "in {year}".

    `value` is the pattern of its value, `scale` the words for comparisons (numbers only), `asks` direct questions.
    """

    key: str
    section: str
    name: str
    part: str
    value: str
    noun: str
    scale: tuple[str, str, str, str] | None = None
    asks: tuple[str, ...] = ()
    plural: str = ""


@dataclass(frozen=True)
class Fact:
    """A value for one country. `evidence` is the part of the passage that states it, with the name of the field."""

    key: str
    country: str
    value: str
    answers: list[str] = field(hash=False)
    passage: str
    evidence: str
    noun: str
    year: str
    field: Field

    @property
    def when(self) -> str:
        """The suffix that a question about a yearly field needs."""
        return f" in {self.year}" if self.year else ""


GEO, PEOPLE, GOV, ECO, COM, TRA = (
    "Geography", "People and Society", "Government", "Economy", "Communications", "Transportation",
)
END = r"(?= ?\(|;|$)"
YEAR = r" \((?P<year>\d{4})(?: est\.)?\)"
KM, SQ_KM, METERS = (rf"(?P<v>{NUMBER} {unit}){END}" for unit in ("km", "sq km", "m"))
PERCENT = rf"(?P<v>{NUMBER}%)"
YEARS = rf"(?P<v>{NUMBER} years){END}"
PLAIN = rf"(?P<v>{NUMBER}(?: (?:thousand|million|billion|trillion))?){END}"
MONEY = r"(?P<v>\$" + NUMBER.removeprefix("-?") + r"(?: (?:thousand|million|billion|trillion))?)" + YEAR
TEXT = r"(?P<v>[^;()\d\[\]]+?)(?= ?\(|;|$)"
QUOTED = r"[\"“](?P<v>[^\"”]+)[\"”](?: \((?P<alt>[^;()]+)\))?"
# The list is in descending order. A tie for first place would give two answers.
PARTNER = rf"(?P<v>[^;,()\d]+?) (?P<share>{NUMBER})%(?!, [^,;]*? (?P=share)%)"
PERSON = (
    r"(?:(?:Acting|Interim|Transitional|Vice) )?(?:President|Prime Minister|King|Queen|Chancellor|Premier|Emperor|Sultan|"
    r"Amir|Grand Duke|Prince|Chief Minister|Governor|Taoiseach|Emir)"
    r"(?: of the (?:Republic|Government|Council of Ministers))? (?P<v>[A-Z][^;,()\d]+?) \(since [^;()]*\)(?=;|$)"
)

FIELDS = (
    Field("area", GEO, "Area", "total", SQ_KM, "the total area", LARGE, ("How large is {c} in total?", "How many square kilometers does {c} cover?")),
    Field("land_area", GEO, "Area", "land", SQ_KM, "the land area", LARGE, ("How much land area does {c} have?",)),
    Field("coastline", GEO, "Coastline", "", KM, "the length of the coastline", LONG, ("How long is the coastline of {c}?",)),
    Field("borders", GEO, "Land boundaries", "total", KM, "the total length of the land boundaries", LONG,
          ("How long are the land boundaries of {c}?",)),
    Field("peak", GEO, "Elevation", "highest point", rf"(?P<v>[^;()\d]+?) (?:\([^()]*\) )?{NUMBER} m{END}", "the highest point", None,
          ("Which mountain or place is the highest point of {c}?",), "highest points"),
    Field("peak_height", GEO, "Elevation", "highest point", rf"[^;()\d]+? (?P<v>{NUMBER} m){END}", "the elevation of the highest point", HIGH,
          ("How high is the highest point of {c}?",)),
    Field("low_point", GEO, "Elevation", "lowest point", rf"(?P<v>[^;()\d]+?) (?:\([^()]*\) )?{NUMBER} m{END}", "the lowest point", None,
          ("Where is the lowest point of {c}?",), "lowest points"),
    Field("mean_elevation", GEO, "Elevation", "mean elevation", METERS, "the mean elevation", HIGH, ("How high does {c} lie on average?",)),
    Field("irrigated", GEO, "Irrigated land", "", rf"(?P<v>{NUMBER} sq km)" + YEAR, "the area of irrigated land", LARGE,
          ("How much irrigated land does {c} have?",)),
    Field("forest", GEO, "Land use", "forest", PERCENT + YEAR, "the share of forest in the land use", HIGH,
          ("What percentage of the land of {c} is forest?",)),
    Field("farmland", GEO, "Land use", "agricultural land", PERCENT + YEAR, "the share of agricultural land in the land use", HIGH,
          ("What percentage of the land of {c} is agricultural?",)),
    Field("population", PEOPLE, "Population", "total", rf"(?P<v>{NUMBER})" + YEAR, "the total population", LARGE,
          ("How many people live in {c}?", "How large is the population of {c}?")),
    Field("men", PEOPLE, "Population", "male", PLAIN, "the male population", LARGE, ("How many men and boys live in {c}?",)),
    Field("women", PEOPLE, "Population", "female", PLAIN, "the female population", LARGE, ("How many women and girls live in {c}?",)),
    Field("demonym", PEOPLE, "Nationality", "noun", r"(?P<v>[A-Z][^;(),/\d]+?)(?:\(s\)|\(es\))(?=;|$)", "the nationality noun for a citizen", None,
          ("What is a citizen of {c} called?",)),
    Field("adjective", PEOPLE, "Nationality", "adjective", r"(?P<v>[A-Z][^;(),/\d]+?)(?=;|$)", "the nationality adjective", None,
          ("Which adjective describes the nationality of {c}?",), "nationality adjectives"),
    Field("median_age", PEOPLE, "Median age", "total", YEARS, "the median age", HIGH, ("How old is the median inhabitant of {c}?",)),
    Field("median_age_men", PEOPLE, "Median age", "male", YEARS, "the median age of men", HIGH),
    Field("median_age_women", PEOPLE, "Median age", "female", YEARS, "the median age of women", HIGH),
    Field("growth", PEOPLE, "Population growth rate", "", PERCENT + YEAR, "the population growth rate", HIGH,
          ("How fast does the population of {c} grow?",)),
    Field("births", PEOPLE, "Birth rate", "", rf"(?P<v>{NUMBER} births/1,000 population)", "the birth rate", HIGH,
          ("How many births per 1,000 people does {c} have?",)),
    Field("deaths", PEOPLE, "Death rate", "", rf"(?P<v>{NUMBER} deaths/1,000 population)", "the death rate", HIGH,
          ("How many deaths per 1,000 people does {c} have?",)),
    Field("urban", PEOPLE, "Urbanization", "urban population", PERCENT, "the urban share of the population", HIGH,
          ("What percentage of the population of {c} is urban?",)),
    Field("infants", PEOPLE, "Infant mortality rate", "total", rf"(?P<v>{NUMBER} deaths/1,000 live births)", "the infant mortality rate", HIGH,
          ("How many infants die per 1,000 live births in {c}?",)),
    Field("life", PEOPLE, "Life expectancy at birth", "total population", YEARS, "the life expectancy at birth", HIGH,
          ("How long do people in {c} live on average?", "How high is life expectancy in {c}?")),
    Field("life_men", PEOPLE, "Life expectancy at birth", "male", YEARS, "the life expectancy at birth of men", HIGH),
    Field("life_women", PEOPLE, "Life expectancy at birth", "female", YEARS, "the life expectancy at birth of women", HIGH),
    Field("fertility", PEOPLE, "Total fertility rate", "", rf"(?P<v>{NUMBER} children born/woman)", "the total fertility rate", HIGH,
          ("How many children are born per woman in {c}?",)),
    Field("mothers", PEOPLE, "Mother's mean age at first birth", "", YEARS, "the mean age of mothers at first birth", HIGH,
          ("How old are mothers in {c} at their first birth?",)),
    Field("maternal", PEOPLE, "Maternal mortality ratio", "", rf"(?P<v>{NUMBER} deaths/100,000 live births)", "the maternal mortality ratio", HIGH),
    Field("physicians", PEOPLE, "Physician density", "", rf"(?P<v>{NUMBER} physicians/1,000 population)", "the physician density", HIGH,
          ("How many physicians per 1,000 people does {c} have?",)),
    Field("beds", PEOPLE, "Hospital bed density", "", rf"(?P<v>{NUMBER} beds/1,000 population)", "the hospital bed density", HIGH,
          ("How many hospital beds per 1,000 people does {c} have?",)),
    Field("obesity", PEOPLE, "Obesity - adult prevalence rate", "", PERCENT, "the adult obesity rate", HIGH,
          ("What percentage of adults in {c} is obese?",)),
    Field("alcohol", PEOPLE, "Alcohol consumption per capita", "total", rf"(?P<v>{NUMBER} liters)(?= of pure alcohol)",
          "the alcohol consumption per capita", HIGH, ("How much pure alcohol does a person in {c} drink a year?",)),
    Field("tobacco", PEOPLE, "Tobacco use", "total", PERCENT, "the rate of tobacco use", HIGH, ("What percentage of people in {c} use tobacco?",)),
    Field("literacy", PEOPLE, "Literacy", "total population", PERCENT, "the literacy rate", HIGH,
          ("What percentage of people in {c} can read and write?",)),
    Field("schooling", PEOPLE, "School life expectancy (primary to tertiary education)", "total", YEARS, "the school life expectancy", HIGH,
          ("How many years of school can a child in {c} expect?",)),
    Field("long_name", GOV, "Country name", "conventional long form", TEXT, "the conventional long form of the name", None,
          ("What is {c} called officially, in the long form?",)),
    Field("local_name", GOV, "Country name", "local short form", TEXT, "the local short form of the name", None,
          ("What do the people of {c} call it, in short?",), "local short names"),
    Field("government", GOV, "Government type", "", r"(?P<v>[a-z][^;()\d\[\],]+?)(?=;|$)", "the government type", None,
          ("What type of government does {c} have?", "How is {c} governed?")),
    Field("capital", GOV, "Capital", "name", r"(?P<v>[^;()\d/,]+?)(?= ?\(|;|$)", "the capital", None,
          ("Which city is the capital of {c}?", "What is the name of the capital city of {c}?"), "capitals"),
    Field("time", GOV, "Capital", "time difference", r"(?P<v>UTC[+-]?\d*(?::\d\d|\.\d+)?)(?= \()", "the time zone of the capital", None,
          ("Which time zone does the capital of {c} keep?",), "time zones of the capitals"),
    Field("independence", GOV, "Independence", "", r"(?P<v>\d{1,2} [A-Z][a-z]+ \d{4})(?= \(from|;|$)", "the date of independence", None,
          ("When did {c} become independent?",)),
    Field("chief", GOV, "Executive branch", "chief of state", PERSON, "the chief of state", None, ("Who is the chief of state of {c}?",)),
    Field("head", GOV, "Executive branch", "head of government", PERSON, "the head of government", None,
          ("Who is the head of government of {c}?",)),
    Field("legislature", GOV, "Legislative branch", "legislature name", r"(?P<v>[A-Z][^;()\d\[\]/]+?)(?: \((?P<alt>[^;()/]+)\))?(?=;|$)",
          "the name of the legislature", None, ("What is the legislature of {c} called?",)),
    Field("chambers", GOV, "Legislative branch", "legislative structure", r"(?P<v>unicameral|bicameral)(?=;|$)", "the legislative structure", None,
          ("Does the legislature of {c} have one chamber or two?",)),
    Field("holiday", GOV, "National holiday", "", r"(?P<v>[A-Z][^;(),\d]+?)(?: \([^()]*\))?, \d{1,2} [A-Z][a-z]+", "the national holiday", None,
          ("Which day is the national holiday of {c}?",)),
    Field("symbol", GOV, "National symbol(s)", "", r"(?P<v>[a-z][^;(),\d]+?)(?=;|$)", "the national symbol", None,
          ("What is the national symbol of {c}?",), "national symbols"),
    Field("colors", GOV, "National color(s)", "", r"(?P<v>[a-z]+(?:, [a-z]+){1,4})(?=;|$)", "the list of national colors", None,
          ("What are the national colors of {c}?",)),
    Field("anthem", GOV, "National anthem(s)", "title", QUOTED, "the title of the national anthem", None, ("What is the national anthem of {c}?",)),
    Field("heritage", GOV, "National heritage", "total World Heritage Sites", rf"(?P<v>{NUMBER})(?= \()", "the number of World Heritage Sites", MANY,
          ("How many World Heritage Sites does {c} have?",)),
    Field("gdp", ECO, "Real GDP (purchasing power parity)", "", MONEY, "the real GDP (purchasing power parity) in {year}", LARGE),
    Field("gdp_growth", ECO, "Real GDP growth rate", "", PERCENT + YEAR, "the real GDP growth rate in {year}", HIGH,
          ("How fast did the real GDP of {c} grow in {year}?",)),
    Field("gdp_head", ECO, "Real GDP per capita", "", MONEY, "the real GDP per capita in {year}", HIGH),
    Field("gdp_nominal", ECO, "GDP (official exchange rate)", "", MONEY, "the GDP at the official exchange rate in {year}", LARGE),
    Field("inflation", ECO, "Inflation rate (consumer prices)", "", PERCENT + YEAR, "the inflation rate in {year}", HIGH,
          ("How high was inflation in {c} in {year}?",)),
    Field("unemployment", ECO, "Unemployment rate", "", PERCENT + YEAR, "the unemployment rate in {year}", HIGH,
          ("How high was unemployment in {c} in {year}?",)),
    Field("labor", ECO, "Labor force", "", PLAIN, "the size of the labor force", LARGE, ("How many people are in the labor force of {c}?",)),
    Field("poverty", ECO, "Population below poverty line", "", PERCENT, "the share of the population below the poverty line", HIGH),
    Field("gini", ECO, "Gini Index coefficient - distribution of family income", "", PLAIN, "the Gini index of family income", HIGH),
    Field("revenue", ECO, "Budget", "revenues", MONEY, "the total of budget revenues", LARGE, ("How much revenue has the budget of {c}?",)),
    Field("spending", ECO, "Budget", "expenditures", MONEY, "the total of budget expenditures", LARGE),
    Field("exports", ECO, "Exports", "", MONEY, "the value of exports in {year}", LARGE, ("How much did {c} export in {year}, in dollars?",)),
    Field("imports", ECO, "Imports", "", MONEY, "the value of imports in {year}", LARGE, ("How much did {c} import in {year}, in dollars?",)),
    Field("export_partner", ECO, "Exports - partners", "", PARTNER, "the largest export partner", None,
          ("Which country buys most of the exports of {c}?",), "largest export partners"),
    Field("import_partner", ECO, "Imports - partners", "", PARTNER, "the largest import partner", None,
          ("From which country does {c} import most?",), "largest import partners"),
    Field("export_good", ECO, "Exports - commodities", "", r"(?P<v>[a-z][^;,()\d]+?), [^;]*\(\d{4}\)", "the top export commodity", None,
          ("Which commodity does {c} export most?",), "top export commodities"),
    Field("import_good", ECO, "Imports - commodities", "", r"(?P<v>[a-z][^;,()\d]+?), [^;]*\(\d{4}\)", "the top import commodity", None,
          ("Which commodity does {c} import most?",), "top import commodities"),
    Field("currency", ECO, "Exchange rates", "Currency", r"(?P<v>[A-Z]?[^;()\d]+?) \((?P<alt>[A-Z]{3})\)(?= per US dollar)", "the currency", None,
          ("Which currency is used in {c}?", "What do people pay with in {c}?"), "currencies"),
    Field("electrified", "Energy", "Electricity access", "electrification - total population", PERCENT, "the rate of access to electricity", HIGH,
          ("What percentage of people in {c} have electricity?",)),
    Field("power_plants", "Energy", "Electricity", "installed generating capacity",
          rf"(?P<v>{NUMBER}(?: million| billion)? kW)(?= \()", "the installed electricity generating capacity", LARGE),
    Field("power_use", "Energy", "Electricity", "consumption", rf"(?P<v>{NUMBER} (?:million|billion|trillion) kWh)(?= \()",
          "the electricity consumption", HIGH, ("How much electricity does {c} consume?",)),
    Field("carbon", "Environment", "Carbon dioxide emissions", "total emissions",
          rf"(?P<v>{NUMBER}(?: million| billion)? metric tonnes)(?= of CO2)", "the total of carbon dioxide emissions", HIGH,
          ("How much carbon dioxide does {c} emit?",)),
    Field("particles", "Environment", "Particulate matter emissions", "", rf"(?P<v>{NUMBER} micrograms per cubic meter)",
          "the level of particulate matter emissions", HIGH),
    Field("phones", COM, "Telephones - mobile cellular", "total subscriptions", PLAIN, "the number of mobile phone subscriptions", HIGH,
          ("How many mobile phone subscriptions are there in {c}?",)),
    Field("landlines", COM, "Telephones - fixed lines", "total subscriptions", PLAIN, "the number of fixed telephone lines", HIGH,
          ("How many fixed telephone lines are there in {c}?",)),
    Field("domain", COM, "Internet country code", "", r"(?P<v>\.[a-z]{2})(?=;|$)", "the internet country code", None,
          ("Which internet country code belongs to {c}?",), "internet country codes"),
    Field("internet", COM, "Internet users", "percent of population", PERCENT, "the share of internet users in the population", HIGH,
          ("What percentage of people in {c} use the internet?",)),
    Field("broadband", COM, "Broadband - fixed subscriptions", "total", PLAIN, "the number of fixed broadband subscriptions", HIGH),
    Field("aircraft", TRA, "Civil aircraft registration country code prefix", "", r"(?P<v>[A-Z0-9]{2})(?=;|$)",
          "the civil aircraft registration prefix", None, ("Which prefix do civil aircraft of {c} carry?",), "aircraft registration prefixes"),
    Field("airports", TRA, "Airports", "", PLAIN, "the number of airports", MANY, ("How many airports does {c} have?",)),
    Field("heliports", TRA, "Heliports", "", PLAIN, "the number of heliports", MANY, ("How many heliports are there in {c}?",)),
    Field("railways", TRA, "Railways", "total", KM, "the total length of railways", LONG, ("How many kilometers of railways does {c} have?",)),
    Field("ships", TRA, "Merchant marine", "total", PLAIN, "the number of ships in the merchant marine", MANY,
          ("How many ships does the merchant marine of {c} have?",)),
    Field("ports", TRA, "Ports", "", PLAIN, "the number of ports", MANY, ("How many ports does {c} have?",)),
    Field("military", "Military and Security", "Military expenditures", "", rf"(?P<v>{NUMBER}%) of GDP" + YEAR,
          "the military expenditure (share of GDP) in {year}", HIGH, ("What share of its GDP did {c} spend on its military in {year}?",)),
    Field("refugees", "Transnational Issues", "Refugees and internally displaced persons", "refugees", PLAIN, "the number of refugees", HIGH,
          ("How many refugees live in {c}?",)),
)
BY_KEY = {item.key: item for item in FIELDS}


def number(value: str) -> float:
    """Return the first number of a value: "$3.732 trillion" gives 3.732e12. Raises ValueError if there is none."""
    match = re.search(rf"({NUMBER})(?: (\w+))?", value)
    if not match:
        raise ValueError(f"no number in {value!r}")
    return float(match.group(1).replace(",", "")) * SCALES.get(match.group(2), 1)


def normalise(text: str) -> str:
    """Return the text in lower case with single spaces, keeping only marks that matter in numbers and names."""
    return " ".join(re.sub(r"[^\w.,%$+/-]+", " ", text.lower()).split())


def holds(text: str, part: str) -> bool:
    """Return whether a text contains `part` as whole words, after normalisation."""
    return re.search(rf"(?<!\w){re.escape(normalise(part))}(?!\w)", normalise(text)) is not None


def variants(value: str, alternative: str | None, is_figure: bool) -> list[str]:
    """Return equivalent forms of an answer: with and without its unit, or a foreign name and its translation."""
    found = [value]
    figure = is_figure and re.fullmatch(rf"(\$?)({NUMBER})(%?)((?: (?:thousand|million|billion|trillion))?)(?: (.+))?", value)
    if figure:
        dollars, digits, percent, scale, _unit = figure.groups()
        found += [digits + scale]
        if percent:
            found.append(f"{digits} percent")
        if dollars:
            found.append(f"{digits}{scale} US dollars")
    elif alternative:
        found.append(alternative.strip())
    elif value in SHORT_NAMES:
        found.append(SHORT_NAMES[value])
    folded = value.translate(str.maketrans("áàâãäåçéèêëíìîïñóòôõöúùûüýÁÉÍÓÚÇÔÖÜ", "aaaaaaceeeeiiiinooooouuuuyAEIOUCOOU"))
    return list(dict.fromkeys([*found, folded]))


def is_clean(value: str) -> bool:
    """Return whether a value is free of footnotes, markup, ranges and alternatives, and short enough."""
    bad = re.search(r"[*<>&\[\]{}|]|\bNA\b|\bnone\b|\bnote\b|\bunknown\b|\bunnamed\b|\bsee\b|\b(?:or|including)\b| - | -- ", value)
    return bool(value) and not bad and len(value.split()) <= MAX_ANSWER_WORDS and len(value) <= 60


def segments(text: str) -> list[str]:
    """Return the fields that share a passage, each starting with its name."""
    return re.split(r"(?<=[.!?]) (?=[A-Z][^.:;]{2,70}: )", text)


def read_facts(passages: list[dict]) -> dict[str, dict[str, Fact]]:
    """Return facts by country and key. A yearly field gives one fact per year, with keys such as "gdp 2023"."""
    by_section = defaultdict(list)
    for passage in passages:
        country, _, section = passage["title"].rpartition(": ")
        by_section[country, section].append(passage)
    fields_of = defaultdict(list)
    for item in FIELDS:
        fields_of[item.section].append(item)
    facts = defaultdict(dict)
    for (country, section), members in by_section.items():
        if country in NOT_COUNTRIES:
            continue
        found = defaultdict(list)
        for passage in members:
            for segment in segments(passage["text"]):
                name = segment.partition(": ")[0]
                for item in fields_of[section]:
                    if item.name == name:
                        for fact in read_segment(item, country, passage["id"], segment):
                            found[fact.key].append(fact)
        for key, several in found.items():
            # Several values of a field, or a field that continues in the next passage, would give several answers.
            if len(several) == 1 and count_starting(members, label_of(several[0])) < 2:
                facts[country][key] = several[0]
    return dict(facts)


def label_of(fact: Fact) -> str:
    return fact.evidence[:fact.evidence.find(fact.value)]


def count_starting(passages: list[dict], label: str) -> int:
    """Return how many passages have a field with this label, such as "Area: total: "; 0 for a part without its field."""
    return sum(f". {label}" in f". {passage['text']}" for passage in passages) if label[:1].isupper() else 0


def read_segment(item: Field, country: str, passage: str, segment: str) -> list[Fact]:
    body_at = len(item.name) + 2
    body = segment[body_at:].rstrip(".")
    yearly = "{year}" in item.noun
    start = rf"(?:^|; ){re.escape(item.part)}: " if item.part else (r"(?:^|; )" if yearly else "^")
    found = []
    for match in re.finditer(start + item.value, body):
        value = match.group("v").strip(" ,")
        groups = match.groupdict()
        alternative = groups.get("alt")
        if not is_clean(value):
            continue
        lead = len(match.group()) - len(match.group().removeprefix("; "))
        evidence = body[match.start() + lead:match.end()]
        if match.start() == 0:
            evidence = f"{item.name}: {evidence}"
        answers = variants(value, alternative if alternative and is_clean(alternative) else None, bool(item.scale))
        if item.key == "currency" and value.endswith("s"):
            answers.insert(1, value[:-1])
        year = groups["year"] if yearly else ""
        key = f"{item.key} {year}".strip()
        found.append(Fact(key, country, value, answers, passage, evidence, item.noun.removesuffix(" in {year}"), year, item))
    return found
