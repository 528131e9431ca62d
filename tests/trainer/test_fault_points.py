"""The injector of faults itself: its points exist, its texts are read, faults are due when they say."""

import importlib

import pytest

from fastmim.config import ConfigError
from fastmim.testing import faults


def test_every_point_exists_and_is_left_alone_without_a_fault(monkeypatch):
    for places in faults.POINTS.values():
        for place in places:
            module, _, path = place.partition(":")
            owner = importlib.import_module(module)
            for name in path.split("."):
                owner = getattr(owner, name)
            assert "wrapper" not in owner.__name__


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("save:renam:kill", "point: expected one of .*did you mean save:rename"),
        ("save:rename:kil@2", "action: expected one of .*did you mean kill"),
        ("save:rename:kill@", "expected POINT:ACTION"),
    ],
)
def test_a_mistake_in_a_fault_is_one_line(text, words):
    with pytest.raises(ConfigError, match=words):
        faults.parse(text)


def test_faults_are_due_when_their_text_says(monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def due(text: str) -> list[int]:
        (fault,) = faults.parse(text)
        return [i for i in range(1, 8) if fault.is_due()]

    assert due("log:write:eio") == [1] and due("log:write:eio@3") == [3]
    assert due("log:write:eio@5+#1") == [5, 6, 7] and due("log:write:eio@2-4") == [2, 3, 4]
    assert due("log:write:eio@2+#0") == []
    assert faults.parse("step:data:sleep=0.25")[0].value == 0.25
