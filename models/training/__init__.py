"""From data to a frozen checkpoint: fitting the families, and what is told of a training."""
