"""The service speaks Semantic IDs: HTTP in front, the registry behind, `models` in between."""
