"""A generator trained on a tokenizer's IDs, and how well that recommends."""
