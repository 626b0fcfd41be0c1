"""Speed, measured: each module is one command that prints one table."""
