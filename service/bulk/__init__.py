"""Bodies of any length, answered while they arrive: NDJSON and Arrow."""
