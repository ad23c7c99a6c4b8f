"""How one content comes to its codes: a dry run that shows its path."""
