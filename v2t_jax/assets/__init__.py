"""What a fresh machine needs offline: the demo corpus and the packaged checkpoint, each with its notice."""
