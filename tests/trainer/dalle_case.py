"""A small d-VAE encoder, and pictures for it."""

import torch

from fastmim.tokenizer import DalleEncoder


def tiny(channels=3, width=8, blocks=2, vocabulary=23, seed=0):
    """Random weights; the last bias is such that no token is the likeliest one everywhere."""
    torch.manual_seed(seed)
    network = DalleEncoder(channels, width, blocks, vocabulary)
    for name, parameter in network.named_parameters():
        if name.endswith(".b"):
            parameter.normal_(std=0.1)
    last = network.blocks["output"]["conv"]
    cells = network.features(pictures(8, channels, 16, 16)).transpose(0, 1).flatten(1)
    last.b.copy_(-(last.w.flatten(1) @ cells).mean(1))
    return network


def pictures(count, channels, height, width, seed=1):
    """Colored squares of 8 pixels with some noise, in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    squares = torch.rand(count, channels, height // 8, width // 8, generator=g)
    squares = squares.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.7 * squares + 0.3 * torch.rand(count, channels, height, width, generator=g)
