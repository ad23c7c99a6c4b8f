"""How the codes of a live record are used, and how far what comes in lies from what its tokenizer was trained on."""
