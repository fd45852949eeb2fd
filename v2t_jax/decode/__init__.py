"""Decoding from any step function: greedy, sampling and beam search. Nothing here knows of a model."""
