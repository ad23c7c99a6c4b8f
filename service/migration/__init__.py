"""From one tokenizer to the next, through the API of a running service."""
