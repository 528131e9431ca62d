"""N accumulated micro-batches give the losses and gradients of one big batch, for every method, engine and rank."""

from pathlib import Path

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import SMALL, model_spec, scramble
from trainer_run import TINY

from fastmim import dist
from fastmim.cli import run as run_command
from fastmim.config import SIZES, Size, TrainConfig
from fastmim.contrast import Representations, among, join
from fastmim.engine import base as engines
from fastmim.engine.single import SingleEngine
from fastmim.methods import base
from fastmim.metrics import Display, Meter
from fastmim.trainer import Trainer

IMAGES = 32
OPTIONS = {
    "cae": dict(mask_ratio=0.5, regressor_depth=1, decoder_depth=1),
    "cmae": dict(mask_ratio=0.5, pixel_decoder_depth=1, feature_decoder_depth=1, decoder_width=32, decoder_heads=4,
                 head_hidden=40, head_out=16),
    "icmae": dict(decoder_width=32, decoder_heads=4, head_hidden=40, head_out=16, contrast_weight=1.0),
    "mae": dict(decoder_width=32, decoder_depth=1, decoder_heads=4),
    "mixedae": dict(decoder_width=32, decoder_depth=1, decoder_heads=4),
    "simmim": {},
}  # fmt: skip
SD_DEC = dict(contrast="sd_dec", contrast_weight=1.0, decoder_width=32, decoder_heads=4, head_hidden=40)
ENGINES = {"cmae": [("ddp", 0), *(("zero", stage) for stage in range(4))], "icmae": [("ddp", 0), ("zero", 3)]}


class Recorded(SingleEngine):
    """Keeps the gradient of each step and changes no weight."""

    def step(self, pairs=(), momentum=1.0):
        self.gradients = {n: p.grad.clone() for n, p in self.method.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(self.gradients.values()))
        self.optimizer.zero_grad(set_to_none=True)
        return engines.StepInfo(norm.isfinite(), norm)


class OneStep:
    """A loader of which the trainer only asks the length."""

    steps_per_epoch = 1


def build(name: str, options: dict) -> base.Method:
    torch.manual_seed(0)
    module = base.find(name)
    method = module.METHOD(model_spec(), module.Config(**options))
    scramble(method, 0)
    return method


def make_batch(method: base.Method) -> Batch:
    g = torch.Generator().manual_seed(0)
    shapes = [(IMAGES, method.model.in_chans, *crop.size) for crop in method.crops]
    # Gray levels differ from image to image: the features of noise alone are nearly equal, and batch norm would blow
    # rounding up.
    crops = (torch.randint(0, 256, shape, generator=g) for shape in shapes)
    level = torch.linspace(0, 1, IMAGES).view(-1, 1, 1, 1)
    return Batch(tuple((c * (0.2 + 0.8 * level)).to(torch.uint8) for c in crops), torch.arange(IMAGES) * 7 + 100)


def engine_spec(accumulate: int, stage: int = 0, world: int = 1) -> engines.EngineSpec:
    return engines.EngineSpec(
        device=torch.device("cpu"), precision="fp32", accumulate=accumulate, micro_batch=IMAGES // accumulate // world,
        lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), clip=None, zero_stage=stage,
    )  # fmt: skip


def take_step(engine, batch: Batch, config: TrainConfig) -> dict[str, float]:
    """One step of the trainer's loop; what it measured."""
    display = Display(1, enabled=False)
    trainer = Trainer(config, engine.method, engine, OneStep(), Path("unused"), display)
    meter = Meter(engine.device)
    trainer._train_step(batch, torch.tensor([3, 11]), meter)
    return meter.read()


def run(name: str, options: dict, accumulate: int, **settings):
    """(measurements, gradients) of one step in one process."""
    engine = Recorded(build(name, options), engine_spec(accumulate))
    config = TrainConfig(batch_size=IMAGES, accumulate=accumulate, steps=1, **settings)
    return take_step(engine, make_batch(engine.method), config), engine.gradients


def distance(gradients: dict, expected: dict) -> float:
    """Relative L2 distance of whole gradients."""
    assert gradients.keys() == expected.keys()
    error = sum((gradients[n].double() - e.double()).square().sum() for n, e in expected.items())
    return float((error / sum(e.double().square().sum() for e in expected.values())).sqrt())


# ---- one process


@pytest.mark.parametrize("name, options", [*OPTIONS.items(), ("icmae", SD_DEC)], ids=[*OPTIONS, "icmae-sd_dec"])
def test_accumulated_micro_batches_equal_one_batch(small, name, options):
    assert sorted(OPTIONS) == base.available(), "a new method has to be listed"
    measured, expected = run(name, options, 1)
    for accumulate in (4, 8):
        values, gradients = run(name, options, accumulate)
        assert values == pytest.approx(measured, rel=2e-6, abs=1e-7), accumulate
        assert distance(gradients, expected) < 1e-6, accumulate


@pytest.mark.parametrize("name", ["cmae", "icmae"])
def test_contrast_inside_micro_batches_is_another_loss(small, name):
    """The case can tell: what --contrast-batch micro gives differs by far more than rounding."""
    measured, expected = run(name, OPTIONS[name], 1)
    values, gradients = run(name, OPTIONS[name], 4, contrast_batch="micro")
    assert abs(values["loss/contrast"] - measured["loss/contrast"]) > 0.01 * measured["loss/contrast"]
    assert distance(gradients, expected) > 0.01


@pytest.mark.parametrize("accumulate, contrast_batch, passes", [(1, "step", 0), (4, "step", 4), (4, "micro", 0)])
def test_representations_are_computed_only_where_they_are_needed(small, accumulate, contrast_batch, passes):
    calls = []

    class Counted(Recorded):
        def represent(self, batch, rng):
            calls.append(len(batch.ids))
            return super().represent(batch, rng)

    engine = Counted(build("cmae", OPTIONS["cmae"]), engine_spec(accumulate))
    config = TrainConfig(batch_size=IMAGES, accumulate=accumulate, steps=1, contrast_batch=contrast_batch)
    take_step(engine, make_batch(engine.method), config)
    assert calls == [IMAGES // accumulate] * passes


def test_rows_of_a_micro_batch_stand_in_their_place_and_carry_the_gradient():
    own = [Representations(torch.full((2, 3), float(i)), torch.full((2, 3), 10.0 + i)) for i in range(3)]
    rests = join(own)
    fresh = torch.tensor([[1.0, 1, 1], [1, 1, 1]], requires_grad=True)
    everything = among(rests[1], fresh)
    assert everything.online[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert everything.target[:, 0].tolist() == [10, 10, 11, 11, 12, 12]
    weights = torch.arange(18.0).view(6, 3)
    (everything.online * weights).sum().backward()
    assert torch.equal(fresh.grad, 3 * weights[2:4])  # the engine divides by the 3 micro-batches


def test_methods_that_cannot_represent_say_so():
    with pytest.raises(TypeError, match="represent: expected the method to define it"):
        base.Method.represent(build("mae", OPTIONS["mae"]), None, None)


# ---- two processes, every engine


def record_two_ranks(folder: str) -> None:
    """In each of two processes: a step of each engine with 2 micro-batches, gradients to a file."""
    dist.start(torch.device("cpu"))
    SIZES["vit_tiny"], rank = Size(*SMALL), dist.rank()
    results = {}
    for name in ENGINES:
        for kind, stage in ENGINES[name]:
            engine = engines.build(kind, build(name, OPTIONS[name]), engine_spec(2, stage, world=2))
            whole = make_batch(engine.method)
            half = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
            share = Batch(tuple(crop[half] for crop in whole.crops), whole.ids[half])
            gradients, step = {}, engine.step

            def recorded(*args, engine=engine, gradients=gradients, step=step, stage=stage):
                for n, p in engine.method.named_parameters():
                    if p.requires_grad:
                        gradients[n] = full_gradient(p, stage)
                return step(*args)

            engine.step = recorded
            config = TrainConfig(batch_size=IMAGES, accumulate=2, steps=1)
            results[name, kind, stage] = take_step(engine, share, config), gradients
            engine.close()
    if dist.is_main():
        torch.save(results, f"{folder}/results.pt")
    dist.finish()


def full_gradient(parameter: torch.Tensor, stage: int) -> torch.Tensor:
    if stage == 0:
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).float().clone()


@pytest.fixture(scope="module")
def two_ranks(server, tmp_path_factory) -> dict:
    """What `record_two_ranks` found."""
    folder = tmp_path_factory.mktemp("ranks")
    server.run(["--call", "test_accumulation", "record_two_ranks", str(folder)], world=2)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name, kind, stage", [(name, *engine) for name in ENGINES for engine in ENGINES[name]])
def test_micro_batches_on_two_ranks_equal_one_batch(small, two_ranks, name, kind, stage):
    measured, expected = run(name, OPTIONS[name], 1)
    values, gradients = two_ranks[name, kind, stage]
    assert values == pytest.approx(measured, rel=2e-6, abs=1e-7)
    assert distance(gradients, expected) < 1e-6


# ---- what the user sees


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--accumulate", "4"], "contrast  among all 8 images of a step"),
        (["--accumulate", "4", "--contrast-batch", "micro"], "warning   cmae compares the images of a micro-batch with "
                                                             "each other: --accumulate 4 leaves 2 of 8"),
    ],
)  # fmt: skip
def test_command_says_what_is_compared(images, capsys, arguments, expected):
    assert run_command(["train", "--method", "cmae", "--data", str(images), *TINY, "--steps", "1", "--dry-run",
                        *arguments]) == 0  # fmt: skip
    assert expected in capsys.readouterr().out
