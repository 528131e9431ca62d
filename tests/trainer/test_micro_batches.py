"""How a CPU cuts a step into micro-batches when nobody says how."""

import pytest
import torch
from fastmim_kernels import dispatch

from fastmim import memory
from fastmim.arguments import parse_train
from fastmim.methods import base as methods

CPU = torch.device("cpu")
# Why attention has no kernel here; "": it has one.
MISSING = dispatch.load("qkv", "native")


def cut(*arguments: str, world: int = 1, device: torch.device = CPU) -> int:
    config = parse_train(["--data", ".", "--precision", "bf16", *arguments])
    with torch.device("meta"):
        method = methods.build(config.method, config.model_spec(), config.options, 0)
    return memory.micro_batches(config, method, world, device)


BASE = ("--preset", "paper", "--model", "vit_small", "--batch-size", "64")


@pytest.mark.parametrize(
    ("kernels", "largest", "parts"),
    [
        # MAE's decoder: 197 tokens x 2048 x 2 bytes = 0.8 MB an image; 16 images fit into 16 MB, 32 do not.
        pytest.param("native", 197 * 2048 * 2, (4, 1, 1), marks=pytest.mark.skipif(bool(MISSING), reason=MISSING)),
        # Attention in plain torch writes its scores: 16 heads x 197 x 197 x 2 bytes = 1.2 MB.
        ("reference", 16 * 197 * 197 * 2, (8, 2, 2)),
    ],
)
def test_a_large_step_is_cut_so_that_its_largest_tensor_is_small(kernels, largest, parts, monkeypatch):
    others = dispatch.backend_of
    monkeypatch.setattr(dispatch, "backend_of", lambda op, device: kernels if op == "qkv" else others(op, device))
    whole, of_4_ranks, of_16_images = parts
    assert cut("--method", "mae", *BASE) == whole
    assert cut("--method", "mae", *BASE, world=4) == of_4_ranks
    # What a layer makes of its weights alone does not grow with the batch.
    assert cut("--method", "mae", *BASE, "--model", "vit_base", "--batch-size", "16") == of_16_images
    spec = parse_train(["--method", "mae", "--data", ".", *BASE])
    bytes_of_8 = memory.largest_tensor("mae", spec.model_spec(), spec.options, 8, low_precision=True)
    assert bytes_of_8 == 8 * largest


def test_what_is_small_contrastive_or_on_a_gpu_stays_whole():
    assert cut("--method", "mae", "--preset", "demo") == 1
    assert cut("--method", "cmae", *BASE) == 1
    assert cut("--method", "mae", *BASE, device=torch.device("cuda")) == 1


@pytest.mark.parametrize(("method", "group"), [("mixedae", 4), ("cae", 1), ("simmim", 1)])
def test_groups_stay_whole_and_micro_batches_equal(method, group):
    parts = cut("--method", method, *BASE)
    assert parts > 1 and 64 % (parts * group) == 0
