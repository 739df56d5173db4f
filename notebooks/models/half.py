"""Write a model.pt anew with its weights in half precision, which `load` reads like any other.

    python notebooks/models/half.py out/digits/model.pt notebooks/models/digits.pt
"""

import sys

import torch


def half(value):
    if isinstance(value, dict):
        return {key: half(part) for key, part in value.items()}
    return value.half() if torch.is_tensor(value) and value.is_floating_point() else value


if __name__ == "__main__":
    torch.save(half(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
