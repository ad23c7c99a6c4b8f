"""A whole catalogue at once: files in, the same items with their Semantic IDs out."""
