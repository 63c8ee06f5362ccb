"""Is a generated answer the expected one: compared word by word, written as VQA's scoring writes answers.

Case, articles, punctuation and the spelling of small numbers do not count; letters of every script, signs, decimals
and symbols do.
"""

from __future__ import annotations

import re
from unicodedata import category, digit, normalize

ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS.split(" "))} | {"none": "0"}
_NOT = "ai are ca could did do does had has have is might must need ought sha should was were wo would"
_JOINED = (
    "could've would've should've might've must've I've you've we've they've you're they're I'm that's what's where's "
    "there's he's she's how's you'd they'd you'll they'll it'll o'clock y'all ma'am"
)
# What people type without its apostrophe; words that mean something else without it (we're, he'll) are not here.
CONTRACTIONS = {w.replace("'", "").lower(): w.lower() for w in _JOINED.split(" ")}
CONTRACTIONS |= {f"{stem}nt": f"{stem}n't" for stem in _NOT.split(" ")}
_APOSTROPHES, _DASHES = "’‘ʼ＇`", "−–‐‑‒"
# On a line of "a" for letters and marks, "0" for digits: a number with its sign, decimals, what else joins digits
# (10:30, 1/2, 3-5) and its unit; a word; any other symbol alone.
_TOKEN = re.compile(
    r"""(?:(?<![^\s(\[{"'=:,;<>$€£¥])-)?(?:0|(?<!\w)\.0)0*(?:[.,:/-]0+)*\w*|\w+(?:'\w+)*|[^\s\w]""",
)
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_INITIALS = re.compile(r"(?<!\w)(?:[^\W\d_]\.){2,}[^\W\d_]?(?!\w)")
_DROPPED = "=+\\<>`|"  # symbols that say nothing in an answer, as punctuation does
_SAYING = "%#&"  # and punctuation that does


def words(text: str, articles: bool = False) -> list[str]:
    """The words and numbers of an answer: "The Cat." -> ["cat"], "1,000" -> ["1000"], "-5" -> ["-5"], "Two" -> ["2"].

    articles: keep them. A text of punctuation alone stays as it is.
    """
    plain = _clean(text)
    found = [plain[m.start() : m.end()] for m in _TOKEN.finditer("".join(map(_kind, plain)))]
    found = [_number(w) for w in found if len(w) > 1 or _counts(w)]
    return [w for w in found if articles or w not in ARTICLES] if found else text.split()


def mark(generated: str, ended: bool, answer: str) -> tuple[bool, bool]:
    """(answer right, stopped right): it begins with the answer; it is the answer, and then the end token.

    Digits that stand apart may be written together ("4 7" and "47"); a number is never the beginning of another.
    """
    letter = not words(answer)  # choice A, which is no article
    said, wanted = words(generated, letter), _spelled(words(answer, letter))
    same = _spelled(said) == wanted
    right = same or any(_spelled(said[:n]) == wanted for n in range(1, len(said)))
    return right, ended and same


def _clean(text: str) -> str:
    """One way of writing for letters, digits, dashes and apostrophes; no accent is lost."""
    text = normalize("NFKC", normalize("NFKC", text).casefold()).replace("⁄", "/")
    for signs, plain in ((_APOSTROPHES, "'"), (_DASHES, "-")):
        text = re.sub(f"[{signs}]", plain, text)
    text = "".join(str(digit(c, c)) if c.isdecimal() else c for c in text if not _invisible(c))
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return _INITIALS.sub(lambda m: m[0].replace(".", ""), text)


def _invisible(char: str) -> bool:
    return category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"  # joiners, and how an emoji is drawn


def _kind(char: str) -> str:
    if char.isdecimal():
        return "0"
    return "a" if category(char)[0] in "LMN" else " " if char == "_" else char


def _counts(char: str) -> bool:
    return category(char)[0] in "LMN" or (category(char)[0] == "S" and char not in _DROPPED) or char in _SAYING


def _number(word: str) -> str:
    word = CONTRACTIONS.get(word, word)
    if re.match(r"-?\.\d", word):
        word = word.replace(".", "0.", 1)
    return DIGITS.get(word, word)


def _spelled(found: list[str]) -> list[str]:
    """Numbers digit by digit."""
    return [part for word in found for part in (word if word.lstrip("-")[:1].isdigit() else [word])]
