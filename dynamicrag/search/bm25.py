"""BM25 (Robertson and Zaragoza, 2009), the lexical baseline, over a passage store; implemented with bm25s.

The variant is Lucene's with k1 = 0.9 and b = 0.4, Anserini's settings for Wikipedia. Words are lower-cased, have at
least two letters, are not English stop words, and are reduced to Snowball stems. Scripts without spaces between words
(Chinese, Japanese, Thai and others) are cut into pairs of neighbouring characters, like in Lucene's CJKAnalyzer. The
index is built once, stored in the store's folder and memory-mapped.
"""

from __future__ import annotations

import itertools
import re
import shutil
import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.files.locks import exclusive
from dynamicrag.search.passages import PassageStore
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import bm25s
    import numpy as np

K1, B = 0.9, 0.4
# Version of the word splitting. An index of another version is built again.
WORDS_VERSION = b"2"
WORD = re.compile(r"\b\w\w+\b")
# Han, Hiragana, Katakana, Bopomofo, Yi; Hangul, whose words have endings; Thai, Lao, Myanmar, Khmer, Tibetan.
UNSPACED = (
    "\u0e01-\u0e7f\u0e81-\u0eff\u0f40-\u0fbc\u1000-\u109f\u1780-\u17d3\u1100-\u11ff\u3005-\u3007\u3041-\u312f\u3131-\u318e\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width Latin letters and digits
ROWS_READ = 1000


class Bm25Index:
    """BM25 search over every passage of a store."""

    def __init__(self, folder: Path):
        """Open the index in `folder`. Raises UserError if its files are damaged."""
        import bm25s
        import numpy as np

        try:
            self._bm25 = bm25s.BM25.load(folder, mmap=True)
            self.count: int = self._bm25.scores["num_docs"]
            arrays = [self._bm25.scores[name] for name in ("data", "indices", "indptr")]
            if type(self.count) is not int or not all(isinstance(array, np.ndarray) for array in arrays):
                raise ValueError("its files do not belong together")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
            raise UserError(f"{folder}: the BM25 index is damaged ({error}); remove it and run the stage "
                            "again") from error

    def search(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best passages for each text, best first: scores float32 and positions int64, both [n, k].

        Equal scores are in corpus order. A passage that contains no word of the text is not returned; missing positions
        are -1, at the end.
        """
        import numpy as np

        k = min(k, self.count)
        scores = np.zeros((len(texts), k), dtype=np.float32)
        positions = np.full((len(texts), k), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            tokens = [self._bm25.vocab_dict[word] for word in words(text) if word in self._bm25.vocab_dict]
            if not tokens:
                continue
            score = self._bm25.get_scores_from_ids(tokens)
            hits = np.flatnonzero(score > 0)
            if len(hits) > k:
                hits = hits[score[hits] >= np.partition(score[hits], -k)[-k]]
            hits = hits[np.argsort(-score[hits], kind="stable")][:k]
            scores[row, : len(hits)], positions[row, : len(hits)] = score[hits], hits
        return scores, positions


def words(text: str) -> list[str]:
    """Return the words of a text that are indexed and searched, in order and with repeats."""
    if text.isascii() or not _patterns()["special"].search(text):
        return [_stem(word) for word in WORD.findall(text.lower()) if word not in _stop_words()]
    return _words_of_any_script(unicodedata.normalize("NFC", text).translate(FULL_WIDTH).lower())


def _words_of_any_script(text: str) -> list[str]:
    """words() for a text that contains marks or characters of an unspaced script."""
    patterns = _patterns()
    result = []
    for run in patterns["run"].findall(text):
        for piece in patterns["piece"].findall(run):
            letters = patterns["letter"].findall(piece)
            if patterns["unspaced"].match(piece):
                result += map("".join, itertools.pairwise(letters)) if len(letters) > 1 else letters
            elif len(letters) > 1 and piece not in _stop_words():
                result.append(_stem(piece))
    return result


@cache
def _patterns() -> dict[str, re.Pattern]:
    """Return the patterns by name. Marks, such as vowel signs, belong to the preceding letter but are not part of \\w.

    Only marks of the Basic Multilingual Plane are included, because several hundred more make a pattern ten times
    slower.
    """
    marks = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    return {name: re.compile(pattern) for name, pattern in {
        "special": f"[{UNSPACED}{marks}\\uff01-\\uff5e]", "unspaced": f"[{UNSPACED}]", "run": f"[\\w{marks}]+",
        "piece": f"[{UNSPACED}][{UNSPACED}{marks}]*|[^{UNSPACED}]+", "letter": f".[{marks}]*",
    }.items()}


@cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


@lru_cache(1 << 20)  # a server gets new words for ever
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@cache
def _stemmer():
    from nltk.stem.snowball import EnglishStemmer

    return EnglishStemmer()


def open_bm25(store: PassageStore) -> Bm25Index:
    """Open the BM25 index of a store. Build it first if it does not exist. A rebuilt store has no index."""
    folder, version = store.folder / "bm25", store.folder / "bm25.version"
    try:
        with exclusive(folder):
            if folder.is_dir() and (not version.is_file() or version.read_bytes() != WORDS_VERSION):
                shutil.rmtree(folder)
            if not folder.is_dir():
                building = Path(f"{folder}.building")
                shutil.rmtree(building, ignore_errors=True)
                _build(store).save(building, show_progress=False)
                version.write_bytes(WORDS_VERSION)
                building.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: the BM25 index cannot be written ({error}); give --passage_store") from error
    return Bm25Index(folder)


def _build(store: PassageStore) -> bm25s.BM25:
    import bm25s
    from tqdm import tqdm

    log.info("building the BM25 index %s (once)", store.folder / "bm25")
    vocabulary: dict[str, int] = {}
    tokens = []
    with tqdm(total=len(store), desc="words", unit=" passages", unit_scale=True) as progress:
        for start in range(0, len(store), ROWS_READ):
            columns = store.slice(start, min(start + ROWS_READ, len(store)))
            for title, text in zip(columns["title"], columns["text"], strict=True):
                tokens.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(f"{title} {text}")])
            progress.update(len(columns["text"]))
    if not vocabulary:
        raise UserError(f"{store.folder}: no passage contains a word that BM25 can search; check the corpus")
    _stem.cache_clear()
    bm25 = bm25s.BM25(k1=K1, b=B, method="lucene")
    bm25.index((tokens, vocabulary), show_progress=False)
    return bm25
