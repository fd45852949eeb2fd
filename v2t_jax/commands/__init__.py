"""What each command of `v2t` does: a dataclass of its options, documented for `--help`, and `run`."""
