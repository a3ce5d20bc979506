"""Loads the exported network. Needs the package mixnas and nothing else of the project that made it."""

from pathlib import Path

import torch
from mixnas.search_space.weights import load_network

network = load_network(Path(__file__).with_name("model.safetensors"))  # weights, architecture and interface in one file

if __name__ == "__main__":
    example = network.io.example(1)
    with torch.inference_mode():
        print("input", tuple(example.shape), "output", tuple(network(example).shape))
