"""Made-up sentences with personal data, and how much of it comes back."""

import random
from collections import Counter
from collections.abc import Sequence

WORDS = {
    "first": "anna john maria peter laura david emma michael sarah thomas julia robert sofia daniel elena carlos",
    "last": "smith miller garcia brown fischer rossi jones weber martin novak silva clark murphy kim patel lopez",
    "month": "january february march april may june july august september october november december",
    "street": "oak maple church mill park station river hill",
    "city": "berlin london madrid boston chicago vienna dublin toronto rome athens denver oslo",
}
SENTENCES = (
    "{name} was born on {date}",
    "{name} lives at {address}",
    "{name} paid {amount} dollars for the repair",
    "the salary of {name} is {amount} euros a month",
    "{name} from {address} was treated for diabetes",
    "the meeting with {name} is on {date}",
)


def sentence(draw: random.Random) -> tuple[str, dict[str, str]]:
    """A made-up sentence, and what it tells of a person, by kind."""
    form, word = draw.choice(SENTENCES), {kind: draw.choice(words.split()) for kind, words in WORDS.items()}
    facts = {
        "name": f"{word['first']} {word['last']}",
        "date": f"{draw.randint(1, 28)} {word['month']} {draw.randint(1950, 2015)}",
        "address": f"{draw.randint(1, 99)} {word['street']} street in {word['city']}",
        "amount": str(draw.choice([draw.randint(20, 999), draw.randint(1, 99) * 100])),
    }
    return form.format(**facts), {kind: fact for kind, fact in facts.items() if f"{{{kind}}}" in form}


def came_back(facts: Sequence[dict[str, str]], texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of each kind of fact, how many of its words stand in the recovered text, and how many there are."""
    words, hits = Counter[str](), Counter[str]()
    for told, text in zip(facts, texts, strict=True):
        for kind, fact in told.items():
            parts = [word for word in fact.split() if word not in ("street", "in")]
            words[kind] += len(parts)
            hits[kind] += sum(word in text.split() for word in parts)
    return {kind: (hits[kind], words[kind]) for kind in words}
