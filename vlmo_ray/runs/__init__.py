"""What a run keeps in its store, and how it is read back."""
