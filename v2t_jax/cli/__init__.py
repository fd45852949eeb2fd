"""The `v2t` command."""
