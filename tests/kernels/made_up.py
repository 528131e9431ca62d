"""Inputs of the tests of the native kernels, and which ops have one."""

import torch
from fastmim_kernels import dispatch

NATIVE = [op for op in dispatch.ops() if not dispatch.load(op, "native")]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def permutations(batch, count, seed=0):
    return torch.rand((batch, count), generator=torch.Generator().manual_seed(seed)).argsort(1)
