"""One file per task: its fields, its loss and its metrics."""
