"""What a run leaves in its store, and how it is read again."""
