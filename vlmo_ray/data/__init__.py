"""From object storage to training batches."""
