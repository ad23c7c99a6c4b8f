"""From many callers to one model: lanes, room, turns, batches."""
