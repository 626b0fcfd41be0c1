"""Texts set in type: pictures whose every letter is known."""
