"""How much personal data comes back: `python docs/personal_data.py [texts]` recovers made-up sentences.

Prints each sentence beside what was recovered, how many are exact, and how many words of each kind came back.
"""

import random
import sys
from collections import Counter

import v2t_jax
from v2t_jax import progress
from v2t_jax.parallel.compile_cache import enable_compilation_cache

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


def main(count: int = 64) -> None:
    progress.enable()
    enable_compilation_cache()
    made = [sentence(random.Random(i)) for i in range(count)]
    found = v2t_jax.invert_strings(v2t_jax.load(), [text for text, _ in made])
    words, hits = Counter[str](), Counter[str]()
    for (_, facts), one in zip(made, found, strict=True):
        print(f"{one.cosine:.4f}  {one.reference}  |  {one.text}")
        for kind, fact in facts.items():
            parts = [word for word in fact.split() if word not in ("street", "in")]
            words[kind] += len(parts)
            hits[kind] += sum(word in one.text.split() for word in parts)
    print(f"exact: {sum(bool(one.exact_match) for one in found)} of {count}")
    for kind in words:
        print(f"words of {kind}: {hits[kind]} of {words[kind]} came back")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
