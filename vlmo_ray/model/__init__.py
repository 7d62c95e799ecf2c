"""The multiway transformer and its heads: architecture only, no losses, no files, no Ray."""
