"""A record to a file and back: `semid export`, `semid import`."""
