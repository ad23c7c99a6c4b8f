"""The service changed while it runs: other tokenizers, without a lost request."""
