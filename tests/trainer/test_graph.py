"""A step on tensors that stay in place gives what the plain step gives; captured into a graph, on a GPU, too."""

import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fastmim_pipelines.spec import Batch
from test_accumulation import OPTIONS, SD_DEC, OneStep, build, engine_spec, make_batch
from torch.overrides import TorchFunctionMode

from fastmim.arguments import parse_train
from fastmim.config import ConfigError, TrainConfig
from fastmim.engine.ddp import DdpEngine
from fastmim.engine.single import SingleEngine
from fastmim.graph import WARMUP_STEPS_DDP, CaptureError, GraphError, StaticStep, choose_graph
from fastmim.metrics import Display, Meter
from fastmim.nonfinite import NonFiniteError
from fastmim.step import copy_stream, to_device
from fastmim.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small")
STEPS = 5
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Run:
    """Some steps of a trainer, with a learning rate that moves, on other images in each step."""

    engine_class = SingleEngine

    def __init__(
        self, name: str, options: dict, graph: str, accumulate: int = 1, device=CPU, precision="fp32", **config
    ):
        torch.manual_seed(0)
        method = build(name, options)
        spec = engine_spec(accumulate)._replace(clip=1.0, device=device, precision=precision, has_graph=graph != "off")
        self.engine = self.engine_class(method, spec)
        config = TrainConfig(
            batch_size=8, accumulate=accumulate, steps=20, warmup="3st", lr=1e-3, contrast_batch="step", **config
        )
        self.trainer = Trainer(
            config, method, self.engine, OneStep(), Path("unused"), Display(1, enabled=False), graph=graph
        )
        self.images, self.meter = make_batch(method), Meter(device)
        self.rng = torch.tensor([3, 0], device=device)
        self.losses: list[float] = []

    def step(self) -> None:
        step = self.trainer.step
        order = (torch.arange(8) * 3 + 5 * step) % len(self.images.ids)
        batch = Batch(tuple(crop[order] for crop in self.images.crops), self.images.ids[order] + 100 * step)
        self.trainer._train_step(batch, self.rng, self.meter)
        self.losses.append(float(self.trainer.taken.losses[0]))
        self.trainer.step += 1

    def steps(self, count: int = STEPS) -> "Run":
        for _ in range(count):
            self.step()
        return self

    def state(self) -> dict[str, torch.Tensor]:
        state = {}
        self.engine.save(lambda file, name, tensor: state.update({f"{file}:{name}": tensor.detach().clone()}))
        return state


def assert_equal(ours: Run, theirs: Run) -> None:
    a, b = ours.state(), theirs.state()
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a)
    assert not [name for name in a if not a[name].equal(b[name])]
    assert ours.losses == theirs.losses and len(set(ours.losses)) == len(ours.losses)
    assert repr(ours.meter.read()) == repr(theirs.meter.read())  # nan equals nan
    assert ours.rng.equal(theirs.rng) and ours.rng[1] == len(ours.losses)


@pytest.mark.parametrize(
    ("name", "options", "accumulate"),
    [*((name, options, 1) for name, options in OPTIONS.items()), ("icmae", SD_DEC, 1), ("mae", OPTIONS["mae"], 2),
     ("cmae", OPTIONS["cmae"], 2)],
    ids=[*OPTIONS, "sd_dec", "mae-accumulate2", "cmae-accumulate2"],
)  # fmt: skip
def test_tensors_that_stay_in_place_change_no_bit(name, options, accumulate):
    plain, static = (Run(name, options, graph, accumulate).steps() for graph in ("off", "on"))
    assert static.trainer.static.steps == STEPS and plain.trainer.static is None
    assert_equal(static, plain)
    places = static.trainer.static.batch
    assert all(crop.data_ptr() != given.data_ptr() for crop, given in zip(places.crops, static.images.crops))


class Uploads(TorchFunctionMode):
    """Collects where tensors are made of numbers of the host: on a GPU, that is a copy which a capture does not allow."""

    makers = (
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.from_numpy,
        torch.scalar_tensor,
        torch.Tensor.new_tensor,
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.makers and not any(
            isinstance(a, torch.Tensor) for a in args[func is torch.Tensor.new_tensor :]
        ):
            here = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            self.found.append(f"{here.filename}:{here.lineno} {here.line}")
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_uploads():
    like = torch.zeros(1)
    for make in (lambda: torch.tensor([1.0]), lambda: like.new_tensor([1.0]), lambda: torch.as_tensor(1.0)):
        with Uploads() as watch:
            make()
        assert len(watch.found) == 1 and "test_graph.py" in watch.found[0]
    with Uploads() as watch:
        torch.as_tensor(like), torch.full((1,), 2.0), like + 1
    assert not watch.found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"), [*OPTIONS.items(), ("icmae", SD_DEC)], ids=[*OPTIONS, "sd_dec"]
)  # fmt: skip
def test_a_step_makes_no_tensor_of_numbers_of_the_host(name, options, accumulate, monkeypatch):
    """But for the address tables of Triton's AdamW and EMA, which have their own way, see test_kernel_addresses.py."""
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")
    run = Run(name, options, "on", accumulate).steps(1)
    static = run.trainer.static
    # On CPUs ops look at values to check them; not on GPUs, nor here.
    with Uploads() as watch, patch("torch.compiler.is_compiling", return_value=True):
        static._run()
    assert not watch.found


class DdpRun(Run):
    engine_class = DdpEngine


@pytest.fixture
def process_group():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_on_tensors_that_stay_in_place(process_group):
    """A gradient that is thrown away before, as when a step is captured, leaves nothing behind either."""
    plain, static = (DdpRun("mae", OPTIONS["mae"], graph, 2) for graph in ("off", "on"))
    static.steps(1)
    assert static.trainer.static.warmup_steps == WARMUP_STEPS_DDP  # one process or many: DDP times its first steps
    static.trainer.program.gradient(static.trainer.static.batch, static.rng)
    assert static.engine.discard() > 0
    assert all(parameter.grad is None for parameter in static.engine.parameters)
    assert_equal(static.steps(STEPS - 1), plain.steps())
    for run in (plain, static):
        run.engine.close()


def spoil(run: Run, monkeypatch, *steps: int) -> None:
    """Makes the gradient of some steps not finite."""
    backward = run.engine.backward
    monkeypatch.setattr(
        run.engine, "backward", lambda loss: backward(loss * (torch.nan if run.trainer.step in steps else 1.0))
    )


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(monkeypatch):
    plain, static = (Run("cmae", OPTIONS["cmae"], graph) for graph in ("off", "on"))
    for run in (plain, static):
        spoil(run, monkeypatch, 2)
        run.steps()
        run.trainer._settle()
        assert run.trainer.skips.state() == [2]
    assert_equal(static, plain)


@pytest.mark.parametrize("budget", [0, 2])
def test_the_step_that_ends_a_run_leaves_its_weights(monkeypatch, budget):
    """However late flags are read, the last one is read before the next update: the capture needs the weights."""
    run = Run("mae", OPTIONS["mae"], "on", skip_budget=budget)
    spoil(run, monkeypatch, 1, 2, 3)
    kept = []
    monkeypatch.setattr(
        run.trainer, "_capture", lambda: kept.append((run.trainer.taken.step, run.state())) or Path("x")
    )
    run.steps(1)
    before = run.state()
    with pytest.raises(NonFiniteError, match=f"step {1 + budget}: {1 + budget} of the last"):
        run.steps()
    ((step, state),) = kept
    assert step == 1 + budget == run.trainer.step - 1
    assert all(state[name].equal(before[name]) for name in before)


def test_a_step_that_cannot_be_captured_is_taken_plainly(monkeypatch, capsys):
    """Under auto; the number of steps before does not matter."""
    plain, static = Run("mae", OPTIONS["mae"], "off").steps(), Run("mae", OPTIONS["mae"], "auto")
    monkeypatch.setattr(static.trainer, "display", Display(1, enabled=True))
    run_static, calls = StaticStep.__call__, []

    def refuse(self, *args):
        calls.append(0)
        if len(calls) == 3:
            self._fill(*args)
            raise CaptureError("--graph: the step cannot be captured: a reason")
        return run_static(self, *args)

    monkeypatch.setattr(StaticStep, "__call__", refuse)
    static.steps()
    assert len(calls) == 3 and static.trainer.static is None
    assert (
        "warning   --graph: the step cannot be captured: a reason; training goes on without" in capsys.readouterr().out
    )
    assert_equal(static, plain)


def test_on_ends_the_run_where_auto_goes_on(monkeypatch):
    run = Run("mae", OPTIONS["mae"], "on")
    monkeypatch.setattr(StaticStep, "_run", lambda self: (_ for _ in ()).throw(CaptureError("no")))
    with pytest.raises(CaptureError, match="no"):
        run.step()


def test_batches_of_another_shape_are_refused():
    run = Run("mae", OPTIONS["mae"], "on").steps(1)
    run.images = Batch(tuple(crop[:, :, :-1] for crop in run.images.crops), run.images.ids)
    with pytest.raises(GraphError, match="expected batches of one shape"):
        run.step()


def choice(wanted="auto", device=CUDA, engine="single", precision="bf16", reads_host=False):
    return choose_graph(wanted, device, engine, precision, reads_host=reads_host)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(device=CPU), "a CUDA device, got cpu"), (dict(engine="zero"), "--engine single or ddp, got zero"),
        (dict(precision="fp16"), "bf16 or fp32, got fp16"), (dict(reads_host=True), "got recorded ones"),
    ],
    ids=["cpu", "zero", "fp16", "recorded"],
)  # fmt: skip
def test_graph_is_left_out_where_it_cannot_be(arguments, words):
    assert not choice(**arguments).is_used and words in choice(**arguments).reason
    with pytest.raises(ConfigError, match="--graph on: expected") as error:
        choice("on", **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_graph_is_chosen_on_one_gpu():
    assert choice().is_used and choice(engine="ddp").is_used is False
    assert choice("on", engine="ddp").is_used and not choice("off").is_used


@pytest.mark.parametrize("text", ["graph: off\ncompile: off\n", "graph: 'off'\n", "graph: on\n"])
def test_flags_survive_yaml(tmp_path, text):
    """YAML takes off and on for truth values."""
    (tmp_path / "c.yaml").write_text(text)
    config = parse_train(["--method", "mae", "--config", str(tmp_path / "c.yaml")])
    assert (config.graph, config.compile) == ("on" if "on" in text else "off", "off")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_captured_step_on_a_gpu(name, precision):
    """Replays train like steps without a graph, and the host waits for nothing."""
    count, accumulate = 12, 2
    plain = Run(name, OPTIONS[name], "off", accumulate, CUDA, precision).steps(count)
    captured = Run(name, OPTIONS[name], "on", accumulate, CUDA, precision)
    captured.steps(6)
    assert captured.trainer.static.graph is not None
    settle = captured.trainer._settle
    for _ in range(count - 6):
        captured.trainer._settle = lambda: None
        torch.cuda.set_sync_debug_mode("error")
        try:
            order = (torch.arange(8) * 3 + 5 * captured.trainer.step) % len(captured.images.ids)
            batch = Batch(
                tuple(crop[order].pin_memory() for crop in captured.images.crops),
                (captured.images.ids[order] + 100 * captured.trainer.step).pin_memory(),
            )
            captured.trainer._train_step(batch, captured.rng, captured.meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        captured.losses.append(float(captured.trainer.taken.losses[0]))
        captured.trainer._settle = settle
        settle()
        captured.trainer.step += 1
    assert captured.rng.tolist() == [3, count]
    assert captured.losses == pytest.approx(plain.losses, rel=1e-4 if precision == "fp32" else 2e-2)


def numbered(number: int, is_pinned: bool) -> Batch:
    crop, ids = torch.full((64, 3, 96, 96), number, dtype=torch.uint8), torch.arange(64) + number
    return Batch((crop.pin_memory(),), ids.pin_memory()) if is_pinned else Batch((crop,), ids)


def read(batch: Batch) -> torch.Tensor:
    """(3,) without waiting for it: smallest and largest pixel, sum of the ids."""
    return torch.stack([batch.crops[0].amin().long(), batch.crops[0].amax().long(), batch.ids.sum()])


def expected_of(number: int) -> list[int]:
    return [number, number, 64 * 63 // 2 + 64 * number]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_pinned", [True, False])
def test_batches_come_to_a_gpu_beside_its_work(is_pinned):
    """Each is whole when it is read, its memory is not the next one's before, and the host waits for neither."""
    with torch.cuda.stream(copy_stream(CUDA)):
        torch.empty(64 << 20, dtype=torch.uint8, device=CUDA).fill_(255)  # to be used again, and of no batch's value
    found, busy = [], []
    for i in range(24):
        torch.cuda._sleep(1 << 24)  # cycles: the reader is late
        given = to_device(numbered(i, is_pinned), CUDA)
        busy.append(not torch.cuda.current_stream().query())
        found.append(read(given))
        del given
    assert all(busy[8:])  # before that, page-locked memory is made, for which a device may be waited for
    for i in range(24, 32):
        torch.cuda.synchronize()
        with torch.cuda.stream(copy_stream(CUDA)):
            torch.cuda._sleep(1 << 24)  # the copy is late
        found.append(read(to_device(numbered(i, is_pinned), CUDA)))
    assert torch.stack(found).tolist() == [expected_of(i) for i in range(32)]
