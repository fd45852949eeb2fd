"""How much personal data comes back: `python docs/personal_data.py [texts]` recovers made-up sentences.

Prints each sentence beside what was recovered, how many are exact, and how many words of each kind came back.
"""

import random
import sys

import v2t_jax
from v2t_jax import progress
from v2t_jax.eval.personal import came_back, sentence
from v2t_jax.parallel.compile_cache import enable_compilation_cache


def main(count: int = 64) -> None:
    progress.enable()
    enable_compilation_cache()
    made = [sentence(random.Random(i)) for i in range(count)]
    found = v2t_jax.invert_strings(v2t_jax.load(), [text for text, _ in made])
    for one in found:
        print(f"{one.cosine:.4f}  {one.reference}  |  {one.text}")
    print(f"exact: {sum(bool(one.exact_match) for one in found)} of {count}")
    for kind, (hits, words) in came_back([facts for _, facts in made], [one.text for one in found]).items():
        print(f"words of {kind}: {hits} of {words} came back")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
