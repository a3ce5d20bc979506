"""Where `load_network` was when exports of version 0.1 were written: their `load.py` imports it from here."""

from mixnas.search_space.formats.safetensors import load_network

__all__ = ["load_network"]
