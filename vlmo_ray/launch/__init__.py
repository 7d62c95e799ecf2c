"""All of Ray Train: from a config to a run on a cluster."""
