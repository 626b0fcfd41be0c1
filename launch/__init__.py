"""Command lines: each module has absl flags and one function that tests and notebooks can call too."""
