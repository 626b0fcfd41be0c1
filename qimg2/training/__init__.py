"""Training: optimizer, state, the one loop, checkpoints, and what happens when something goes wrong. Start with `trainer`."""
