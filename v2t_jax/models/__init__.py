"""Networks as pure functions: T5, BERT, the embedder built on them, the inverter and the corrector."""
