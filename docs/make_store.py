"""Makes a Chroma folder to audit, `python docs/make_store.py FOLDER`: held-out sentences and some personal data."""

import random
import sys

import chromadb

import v2t_jax
from v2t_jax.data.split import read_texts

PERSONAL = (
    "write to {name}@example.com",
    "{name} smith, call +49 30 {number}",
    "the card of {name} is 4111 1111 1111 1111",
)


def main(folder: str) -> None:
    draw = random.Random(0)
    texts = read_texts("wordnet", "held_out")[:2000]
    for i in range(0, len(texts), 50):
        name, number = draw.choice(["anna", "peter", "maria", "john"]), draw.randint(100000, 999999)
        texts[i] = draw.choice(PERSONAL).format(name=name, number=number)
    vectors = v2t_jax.embed(texts)
    client = chromadb.PersistentClient(folder, chromadb.Settings(anonymized_telemetry=False))
    notes = client.create_collection("notes", embedding_function=None, metadata={"hnsw:space": "cosine"})
    for i in range(0, len(texts), 500):
        part = range(i, i + 500)
        notes.add(
            ids=[f"n{j}" for j in part],
            embeddings=list(vectors[i : i + 500]),
            documents=texts[i : i + 500],
            metadatas=[{"source": f"/home/anna/notes/{j}.txt"} for j in part],
        )


if __name__ == "__main__":
    main(sys.argv[1])
