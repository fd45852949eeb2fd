"""What can be done to embeddings before they are stored, and what it is worth against an attacker who knows it."""
