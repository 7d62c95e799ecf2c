"""The multiway transformer and its heads: architecture only, without losses, files or Ray."""
