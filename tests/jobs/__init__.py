"""Jobs that tests run: whole programs, small enough to take seconds."""
