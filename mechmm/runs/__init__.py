"""Running experiments from the shell."""
