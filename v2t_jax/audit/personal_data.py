"""Finds personal data in texts: by Presidio where it is installed (extra `pii`), else by a short list of patterns."""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Any, NamedTuple

Found = set[tuple[str, str]]  # kind, and the value in a form that can be compared


class Detector(NamedTuple):
    name: str  # for the report: what was looked for, and by what
    find: Callable[[str], Found]


SHORTEST_ID = 7  # characters
# Texts of a store are anybody's: each pattern takes time in proportion to the text, whatever that is.
_PATTERNS = {
    "email": r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "iban": r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?\b",
    "card": r"\b[2-6](?:[ -]?\d){12,18}\b",  # no issuer has 1: those are times in milliseconds
    "ip": r"\b\d{1,3}(?:\.\d{1,3}){3}\b",
    # With a country's code, a trunk's 0, or in North American groups: dates, times and other numbers are none.
    "phone": r"(?<![\w.-])(?<!\d )(?!\d{1,2}[./-]\d{1,2}[./-]\d{2})"
    r"(?:\+\d{1,3}|\(? ?0\d{1,4}|(?=\(? ?\d{3} ?[)-] ?\d{3}-\d{4})\(? ?\d{3})"
    r"(?: ?\))?(?:[ /-]{0,2}\d{2,5}){2,5}(?!\.?\w)",
}


@functools.cache
def detector() -> Detector:
    """The best that is installed."""
    try:
        import presidio_analyzer.predefined_recognizers as theirs
    except ImportError:
        kinds = ", ".join(_PATTERNS)
        return Detector(f"patterns for {kinds} (no names: the extra pii looks for more)", _by_patterns)
    names = ("Email", "Phone", "CreditCard", "Iban", "Ip", "UsSsn", "Crypto", "UsBank", "UsPassport")
    recognizers = [getattr(theirs, f"{name}Recognizer")() for name in names]
    people, whose = _names()

    def find(text: str) -> Found:
        found = [one for each in recognizers for one in each.analyze(text, each.supported_entities, None) or ()]
        sure = {(one.entity_type.lower(), _compared(text[one.start : one.end])) for one in found if one.score >= 0.4}
        return sure | people(text)

    return Detector(f"Presidio's pattern recognizers{whose}", find)


def in_id(one: Any) -> Found:
    """Personal data in a record's id; short ones are numbers and keys, some of which would pass for phones."""
    return detector().find(str(one)) if len(str(one)) >= SHORTEST_ID else set()


def _names() -> tuple[Callable[[str], Found], str]:
    """Names of people by spaCy, if one of its models is installed."""
    import spacy

    models = [name for name in spacy.util.get_installed_models() if name.startswith("en")]
    if not models:
        return lambda _: set(), "; no names, for want of a spaCy model"
    language = spacy.load(models[0])

    def people(text: str) -> Found:  # recovered words are lower-case, and names are known by their capitals
        shown = text.title() if text.islower() else text
        return {("person", _compared(one.text)) for one in language(shown).ents if one.label_ == "PERSON"}

    return people, f", names by {models[0]}"


def joined(text: str) -> str:
    """Undoes what word-pieces do to addresses and numbers: "john . smith @ example . com" -> john.smith@example.com"""
    text = re.sub(r"(?<=\w) ?([@_]) ?(?=\w)", r"\1", text)
    if "@" in text:  # stops and hyphens inside an address, and nowhere else
        part = r"\w+(?: ?[.+-] ?\w+){0,9}"
        text = re.sub(rf"(?<!\w){part}@{part}", lambda m: m[0].replace(" ", ""), text)
    return re.sub(r"(?<=\d) ?([.,/-]) ?(?=\d)", r"\1", re.sub(r"\+ (?=\d)", "+", text))


def _by_patterns(text: str) -> Found:
    found: Found = set()
    for kind, pattern in _PATTERNS.items():

        def taken(one: re.Match[str], kind: str = kind) -> str:
            if not _CHECKS.get(kind, lambda _: True)(one[0]):
                return one[0]
            found.add((kind, _compared(one[0])))
            return " "  # a card's number is no phone's

        text = re.sub(pattern, taken, text)
    return found


def _compared(value: str) -> str:
    return re.sub(r"[\s()/-]", "", value).lower()


def _is_card(number: str) -> bool:
    """By Luhn's checksum (ISO/IEC 7812-1, annex B)."""
    digits = [int(digit) for digit in re.sub(r"\D", "", number)][::-1]
    total = sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return total > 0 and total % 10 == 0


def _is_iban(number: str) -> bool:
    """By its checksum (ISO 13616): moved and spelled out, it is 1 modulo 97."""
    compact = _compared(number)
    return len(compact) >= 15 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
        return True
    except ValueError:
        return False


_CHECKS: dict[str, Callable[[str], bool]] = {"card": _is_card, "iban": _is_iban, "ip": _is_ip}
