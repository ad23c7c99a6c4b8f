"""What is compiled at installation: the residual search, and the forward pass of BERT text encoders (`forward`).

Where no compiler was there, torch does the same, slower.
"""

from models.native.search import CompiledSearch, compiled_search

__all__ = ["CompiledSearch", "compiled_search"]
