"""Published checkpoints, both ways: tensors and their names, whole folders, export."""
