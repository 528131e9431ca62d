"""What DeepSpeed is told, and that it does so."""

import json
from pathlib import Path

import pytest
import torch
from trainer_run import TINY

from fastmim.engine.zero import bucket_numbers

# ViT-L with 24 blocks, as (numbers of a tensor, how many of them): attention, its output, both layers of the MLP.
VIT_LARGE = [3072 * 1024] * 24 + [1024 * 1024] * 24 + [4096 * 1024] * 48 + [1024] * 200


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([10] * 101, 1010), ([7], 7), (VIT_LARGE, sum(VIT_LARGE)), ([10**8] * 100, 500_000_000)],
    ids=["small", "single", "vit-l", "huge"],
)
def test_the_bucket_follows_the_model(sizes, expected):
    assert bucket_numbers(sizes) == expected
    assert bucket_numbers(iter(sizes)) == expected


def write_buckets(file: str) -> None:
    """In each process of a job: a step at each stage; sizes of DeepSpeed's buffers, and the gradient's norm."""
    from fastmim_pipelines import make_loader

    from fastmim import dist
    from fastmim.arguments import parse_train
    from fastmim.engine import base as engines
    from fastmim.engine import zero
    from fastmim.methods import base as methods

    device, found, ours = torch.device("cpu"), {}, zero.bucket_numbers
    dist.start(device)
    config = parse_train(["--method", "mae", "--data", ".", *TINY, "--steps", "4"])
    for stage in (1, 2, 3):
        for is_large in (False, True):
            method = methods.build("mae", config.model_spec(), config.options, 0)
            trained = [p.numel() for p in method.parameters() if p.requires_grad]
            # Not DeepSpeed's own default: its 2 GB for each would be too much for a small machine.
            wanted = 10 * sum(trained) if is_large else sum(trained)
            zero.bucket_numbers = (lambda sizes, wanted=wanted: wanted) if is_large else ours
            engine = engines.build("zero", method, engines.EngineSpec(
                device=device, precision="fp32", accumulate=1, micro_batch=4, lr=1e-3, weight_decay=0.05,
                betas=(0.9, 0.95), clip=None, zero_stage=stage))  # fmt: skip
            loader, _ = make_loader(
                "synthetic", method.crops, batch_size=4 * dist.world_size(), in_chans=3, rank=dist.rank(),
                world=dist.world_size(),
            )  # fmt: skip
            out = engine.forward(next(iter(loader.epoch(0))), torch.tensor([0, 0]))
            held = []
            release = getattr(engine.optimizer, "_release_ipg_buffers", lambda: None)

            def noted(optimizer=engine.optimizer, held=held, release=release) -> None:
                buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
                held.append(sum(b.numel() for part in buffers for b in (part if isinstance(part, list) else [part])))
                release()

            # Stages 1 and 2 have their buffer during a backward pass, stage 3 has it always.
            engine.optimizer._release_ipg_buffers = noted
            engine.backward(out.loss)
            if stage == 3:
                noted()
            norm = engine.step().grad_norm.item()
            held = max(held)
            found[f"{stage} {'large' if is_large else 'ours'}"] = [held, wanted, sum(trained), norm]
    if dist.is_main():
        Path(file).write_text(json.dumps(found))
    dist.finish()


def test_deepspeed_holds_no_larger_buffer_and_the_gradient_is_the_same(server, tmp_path):
    argv = ["--call", "test_zero_config", "write_buckets", str(tmp_path / "found.json")]
    server.run(argv, world=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 6
    for stage in (1, 2, 3):
        held, wanted, trained, norm = found[f"{stage} ours"]
        assert held == wanted == trained, found
        assert found[f"{stage} large"][0] == 10 * trained, "the case can tell"
        assert norm == found[f"{stage} large"][3] > 0
