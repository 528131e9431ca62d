"""Which of fastmim's registered ops a call goes through."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """The calls of fastmim's own ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastmim":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))
