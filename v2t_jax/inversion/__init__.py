"""From embeddings to text: the correction loop, and the pipeline around it."""
