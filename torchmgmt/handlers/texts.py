"""English text made plain before it is looked up in a vocabulary. The steps are those of TorchServe's text handlers."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

__all__ = [
    "basic_english",
    "expand_contractions",
    "ngrams",
    "remove_accents",
    "remove_html",
    "remove_punctuation",
]

# Not `<.*?>`: on a text of many "<" that looks at the whole rest for each of them.
_HTML = re.compile(r"<[^<>]*>|&(?:[a-z0-9]+|#[0-9]{1,6}|#x[0-9a-f]{1,6});")
# No word has more endings than "y'all'd've"; without a bound a text of nothing else would be one word.
_CONTRACTED = re.compile(r"'cause\b|\b[a-z]+(?:'[a-z]+){1,3}", re.IGNORECASE)
_WORDS = {
    "'cause": "because",
    "ain't": "is not",
    "can't": "cannot",
    "how'd": "how did",
    "let's": "let us",
    "ma'am": "madam",
    "o'clock": "of the clock",
    "sha'n't": "shall not",
    "shan't": "shall not",
    "so's": "so as",
    "where'd": "where did",
    "won't": "will not",
    "y'all": "you all",
}
_ENDINGS = {"d": "would", "ll": "will", "m": "am", "re": "are", "ve": "have"}
_BEFORE_IS = frozenset(["he", "she", "it", "that", "there", "what", "when", "where", "who", "how", "why"])
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOKENS = re.compile(r"[.,()!?']")


def remove_html(text: str) -> str:
    """Return ``text`` without tags and entities."""
    return _HTML.sub("", text)


def expand_contractions(text: str) -> str:
    """Return ``text`` with ``don't`` as ``do not`` and so on, and without the apostrophes that are left."""
    return _CONTRACTED.sub(lambda match: _expanded(match[0]), text).replace("'", "")


def _expanded(word: str) -> str:
    """Take one ending after another off the end; ``y'all've`` is what ``y'all`` is, and ``have``."""
    whole = _WORDS.get(word.lower())
    if whole is not None:
        return word[0] + whole[1:] if word[0].lower() == whole[0] else whole
    begin, _, ending = word.rpartition("'")
    if not begin:
        return word
    if ending.lower() == "t" and begin[-1:].lower() == "n":
        return _expanded(begin[:-1]) + " not"
    if ending.lower() == "s" and begin.lower() in _BEFORE_IS:
        return begin + " is"
    full = _ENDINGS.get(ending.lower())
    return word if full is None else f"{_expanded(begin)} {full}"


def remove_accents(text: str) -> str:
    """Return ``text`` in ASCII: letters lose their accents, what has no such form is left out."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def remove_punctuation(text: str) -> str:
    """Return ``text`` without ASCII punctuation."""
    return text.translate(_NO_PUNCTUATION)


def basic_english(text: str) -> list[str]:
    """Return the tokens of ``text`` as torchtext's tokenizer of this name has them: lower case, punctuation by itself."""
    plain = text.lower().replace('"', "").replace("<br />", " ").replace(";", " ").replace(":", " ")
    return _TOKENS.sub(r" \g<0> ", plain).split()


def ngrams(tokens: Sequence[str], longest: int) -> Iterator[str]:
    """Yield the tokens, then each two neighbours joined by a space, then each three, up to ``longest``."""
    for length in range(1, longest + 1):
        for start in range(len(tokens) - length + 1):
            yield " ".join(tokens[start : start + length])
