"""Text in, batches of token ids out: `sources` (reading, splitting), `tokenize`, `pipeline` (batching)."""
