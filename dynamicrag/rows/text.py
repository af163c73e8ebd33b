"""The one form in which texts are compared before any metric's own rules: NFKC, typographic marks as ASCII."""

import unicodedata

_TYPOGRAPHIC = str.maketrans({**dict.fromkeys("‘’‚‛‹›′ʼ´", "'"), **dict.fromkeys("“”„‟«»″", '"'), **dict.fromkeys("‐‑‒–—―−", "-")})


def composed(text: str) -> str:
    """NFKC, with typographic quotes and dashes as ASCII."""
    # Before NFKC too, which makes of an acute accent on its own a space with an accent.
    return unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHIC)).translate(_TYPOGRAPHIC)
