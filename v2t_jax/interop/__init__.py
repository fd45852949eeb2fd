"""Other libraries' weights and folders, read into ours and, where it is useful, written back."""
