"""The training loop and what it needs: step, state, checkpoints, optimizer, launch, meters."""
