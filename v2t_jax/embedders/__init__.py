"""Text embedders: read from folders, behind a function, behind an endpoint."""
