"""What CLDR (by Babel) knows of how languages write dates and amounts, and which language a document is in."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

from babel import Locale
from babel.localedata import locale_identifiers
from babel.numbers import get_territory_currencies

# Those whose month names are known. CLDR has ten times as many; each takes some milliseconds to load.
LANGUAGES = (
    "en", "en_GB", "de", "fr", "nl", "es", "pt", "it", "da", "nb", "sv", "fi", "is", "pl", "cs", "sk", "hu", "ro",
    "bg", "hr", "sr", "sr_Latn", "bs", "sl", "mk", "sq", "el", "tr", "ru", "uk", "et", "lv", "lt", "ca", "gl",
    "eu", "af", "ga", "mt", "id", "ms", "ja", "zh", "ko", "ar", "fa", "hi", "bn", "ta", "th",
)  # fmt: skip
SURE = 0.9  # probability from which on a document's language counts as known
SAMPLE = 4000  # characters of a document that its language is told from
PREFIX = 3  # letters of a month's name that stand for it
SHORT_SCALES = ("mio", "mill", "milj", "tis", "тыс", "тис")  # abbreviations that have a vowel and no other meaning


def fold(word: str) -> str:
    """A word without case, accents and final point: "FÉVR." and "fevr" are the same."""
    letters = unicodedata.normalize("NFD", word.casefold().rstrip("."))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


@functools.cache
def _months() -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """({name: {language: month}}, the same of the names' beginnings); a month for each language that has the name."""
    exact: dict[str, dict[str, int]] = defaultdict(dict)
    prefixes: dict[str, dict[str, int]] = defaultdict(dict)
    for language in LANGUAGES:
        seen: dict[str, set[int]] = defaultdict(set)
        for month, name in _names(language):
            exact[name][language] = month
            for end in range(PREFIX, len(name)):
                seen[name[:end]].add(month)
        for prefix, months in seen.items():
            if len(months) == 1:
                prefixes[prefix][language] = next(iter(months))
    return exact, prefixes


def _names(language: str) -> Iterator[tuple[int, str]]:
    months = Locale.parse(language).months
    for context in ("format", "stand-alone"):
        for width in ("wide", "abbreviated"):
            for month, name in months[context][width].items():
                if not re.search(r"[\d\s]", name):  # 1月 is read as a number
                    yield month, fold(name)


def months(word: str, language: str | None = None) -> set[int]:
    """The months that a word may mean: its full or short name, or the beginning of it, in any language or in one.

    "listopad" is November in Polish and October in Croatian; "mar" is no beginning of Finnish "marraskuu", since it is
    the short name of March elsewhere.
    """
    folded = fold(word)
    for table in _months():
        if month_by_language := table.get(folded):
            own = {month for code, month in month_by_language.items() if code.partition("_")[0] == language}
            return own or set(month_by_language.values())
    return set()


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = {language.partition("_")[0] for language in LANGUAGES}
    identifier.set_languages([label for label in identifier.labels if label in known])
    return identifier


def language_of(text: str) -> str | None:
    """The language of a document, as "nl"; None where it is not sure."""
    return _language_of(text[:SAMPLE])


@functools.lru_cache(maxsize=256)
def _language_of(text: str) -> str | None:
    words = " ".join(re.findall(r"[^\W\d_]{2,}", text)).lower()
    if not words:
        return None
    language, probability = _identifier().classify(words)
    return language if probability >= SURE else None


def first_in_dates(language: str | None, text: str) -> str | None:
    """ "day", "month" or "year", with which a text's short dates begin; None where neither language nor currency tells.

    English has all three, by country: RM and £ are of countries that put the day first, $ is of many.
    """
    if language not in (None, "en"):
        try:
            return _first_in_dates(Locale.parse(language))
        except ValueError:  # CLDR's UnknownLocaleError is one
            return None
    orders = [order for sign, order in _english_orders().items() if _has_sign(text, sign)]
    distinct = set().union(*orders)
    return distinct.pop() if len(distinct) == 1 else None


def has_dollars_alone(text: str) -> bool:
    """Whether dollars are the only currency in a text: then the United States are likeliest, though not sure."""
    signs = {sign for sign in _english_orders() if _has_sign(text, sign)}
    return bool(signs) and signs <= {"$", "US$", "USD"}


def _first_in_dates(locale: Locale) -> str:
    pattern = locale.date_formats["short"].pattern
    return min(("day", "month", "year"), key=lambda part: pattern.index({"day": "d", "month": "M", "year": "y"}[part]))


@functools.cache
def _english_orders() -> dict[str, set[str]]:
    """{currency code or sign: with what dates begin, in each English-speaking country that has it}."""
    orders: dict[str, set[str]] = defaultdict(set)
    for name in locale_identifiers():
        if not re.fullmatch(r"en_[A-Z]{2}", name):
            continue
        locale = Locale.parse(name)
        for code in get_territory_currencies(locale.territory):
            for sign in {code, locale.currency_symbols.get(code, code)}:
                orders[sign].add(_first_in_dates(locale))
    return dict(orders)


def _has_sign(text: str, sign: str) -> bool:
    before, after = (r"(?<![^\W\d_])" if sign[0].isalpha() else ""), (r"(?![^\W\d_])" if sign[-1].isalpha() else "")
    return re.search(before + re.escape(sign) + after, text) is not None


def decimal_mark(language: str) -> str | None:
    """What a language writes between units and decimals."""
    try:
        return Locale.parse(language).number_symbols["latn"]["decimal"]
    except (ValueError, KeyError):
        return None


@functools.cache
def currency_words() -> frozenset[str]:
    """Codes and signs of currencies that have letters, case folded, without points: "eur", "rm", "rs", "kc"."""
    words = set()
    for language in (*LANGUAGES, *(name for name in locale_identifiers() if re.fullmatch(r"en_[A-Z]{2}", name))):
        for code, sign in Locale.parse(language).currency_symbols.items():
            words |= {fold(code), fold("".join(letter for letter in sign if letter.isalpha()))}
    return frozenset(word for word in words if len(word) > 1)


@functools.cache
def scales() -> dict[str, frozenset[int]]:
    """{folded word: the powers of ten that it stands for in some language}: "million", "mrd", "lakh", "crore", "万".

    Abbreviations that may be another word ("bin", "bill", "T") are left out.
    """
    powers: dict[str, set[int]] = defaultdict(set)
    for language in (*(language for language in LANGUAGES if language != "ga"), "en_IN"):  # Irish has a "mile"
        for width, plurals in Locale.parse(language).compact_decimal_formats.items():
            for size, pattern in (form for forms in plurals.values() for form in forms.items()):
                word = fold(re.sub(r"[0'\u200e\u200f]", "", pattern.pattern).strip())
                if re.fullmatch(r"[^\W\d_]+", word) and _stands_for_one_thing(word, width):
                    powers[word].add(len(size) - pattern.pattern.count("0"))
    return {word: frozenset(found) for word, found in powers.items()}


def _stands_for_one_thing(word: str, width: str) -> bool:
    if word.upper() == word.lower() or word in SHORT_SCALES:  # of a script without small letters
        return True
    return len(word) > 3 if width == "long" else len(word) > 2 and not re.search("[aeiouаеиоуыіαειουω]", word)
