"""The training loop and its numerics; no Ray."""
