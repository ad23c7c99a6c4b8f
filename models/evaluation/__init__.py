"""Measuring tokenizers, by themselves and side by side."""
