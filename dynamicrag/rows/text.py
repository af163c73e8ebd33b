"""Text normalisation that all comparisons share: NFKC, with typographic quotes and dashes as ASCII."""

import unicodedata

_TYPOGRAPHIC = str.maketrans({**dict.fromkeys("‘’‚‛‹›′ʼ´", "'"), **dict.fromkeys("“”„‟«»″", '"'), **dict.fromkeys("‐‑‒–—―−", "-")})


def composed(text: str) -> str:
    """Return the text in NFKC, with typographic quotes and dashes as ASCII."""
    # Translate before NFKC too: NFKC turns a lone acute accent into a space and a combining accent.
    return unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHIC)).translate(_TYPOGRAPHIC)
