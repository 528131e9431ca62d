"""Tables of addresses: the right numbers, and what a captured CUDA graph reads stays as it is."""

import pytest
import torch
from fastmim_kernels import adamw_ema, addresses

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(addresses, "_captured", {})
    monkeypatch.setattr(addresses, "_reserve", torch.empty(7, dtype=torch.int64))


def test_tables_hold_the_numbers_and_are_kept():
    first = addresses.address_table((1, -(2**62)), CPU)
    assert first.tolist() == [1, -(2**62)] and first.dtype == torch.int64
    assert addresses.address_table((1, -(2**62)), CPU) is first
    assert addresses.address_table((2, -(2**62)), CPU).tolist() == [2, -(2**62)]


def test_tables_lie_where_they_are_wanted_whatever_the_default_device_is():
    with torch.device("meta"):
        assert addresses.address_table((3, 1, 4), CPU).tolist() == [3, 1, 4]
        assert addresses._staged((2, 7, 1), CPU).tolist() == [2, 7, 1]


def test_tables_of_captures_are_copied_from_memory_that_nothing_else_gets():
    """What the host side of a capture does, on a CPU: each replay copies the same places again."""
    given = [(1, 2, 3), (4, 5), (1, 2, 3)]
    tables = [addresses._staged(numbers, CPU) for numbers in given]
    assert [tuple(table.tolist()) for table in tables] == given
    assert tables[0].data_ptr() != tables[2].data_ptr() and len(addresses._captured) == 2
    for numbers, host in addresses._captured.items():
        assert tuple(host.tolist()) == numbers
    first, second = (set(range(*places(host))) for host in addresses._captured.values())
    assert not first & second
    with pytest.raises(RuntimeError, match="expected a step like this one before the capture, got a first table of 3"):
        addresses._staged((3, 2, 1), CPU)


def places(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_of_gradients_that_are_made_in_a_capture():
    """Their addresses are new there, and reused by nothing else; older tables may be dropped meanwhile."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    sizes = (3, 1000, 257)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(size, generator=generator, device=device) for size in sizes]

    params, grads = draw(), draw()
    moments = [[torch.zeros_like(p) for p in params] for _ in range(4)]
    count, twice = torch.zeros((), device=device), [p.clone() for p in params]

    def step(parameters: list[torch.Tensor], of: int) -> None:
        count.add_(1 - of)
        adamw_ema(
            parameters, [g * 2 for g in grads], *moments[2 * of : 2 * of + 2], step=count, lr=1e-2, betas=(0.9, 0.95),
            eps=1e-8, weight_decay=[0.1] * 3, targets=[None] * 3, momentum=None, copies=[None] * 3,
        )  # fmt: skip

    for _ in range(2):
        step(params, 0)
        step(twice, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(params, 0)
    for i in range(2 * addresses._kept.cache_info().maxsize):
        addresses.address_table((i,), device)
    for _ in range(3):
        graph.replay()
        step(twice, 1)
    torch.testing.assert_close(params, twice, rtol=0, atol=0)
