"""Checkpoints written behind the training's back: a copy on the host first, then a thread; and read back by rank 0.

Memory is bounded: there is one copy, its buffers are used again, and a save waits for the one before it.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmim import checkpoint, dist

# Failed saves in a row that end a run. Source: own choice; a disk that was full for three saves stays full.
MOST_FAILURES = 3


class StorageError(Exception):
    """The disk takes no more checkpoints."""

    exit_code = 6


class HostCopy:
    """Tensors by file and name, copied to buffers on the host that are used again by the next copy."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}

    def put(self, file: str, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach()
        buffers = self.files.setdefault(file, {})
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name] = buffer
        buffer.copy_(tensor, non_blocking=True)

    def finish(self, device: torch.device) -> None:
        """Waits for the copies from a GPU."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Saver:
    """Writes one checkpoint at a time; rank 0 has one.

    A failed save is reported and training goes on, for `MOST_FAILURES` saves in a row: the disk may get space again,
    and the checkpoint before is still there.
    """

    def __init__(self, root: Path, keep: int, say: Callable[[str], None]):
        self.root, self.keep, self.say = root, keep, say
        self.copy = HostCopy()
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: OSError | SafetensorError | checkpoint.CheckpointError | None = None

    def start(self, step: int, meta: dict, write_more: Callable[[Path], None]) -> None:
        """Begins to write the host copy.

        Args:
            step, meta: see checkpoint.commit.
            write_more: adds small files to the folder, at once.
        """
        self._step, self._error = step, None
        try:
            temporary = checkpoint.prepare(self.root)
            write_more(temporary)
        except (OSError, SafetensorError) as e:
            self._error = e
            return
        # No daemon: a program that ends finishes the checkpoint first.
        self._thread = threading.Thread(target=self._write, args=(temporary, step, meta), name="checkpoint")
        self._thread.start()

    def _write(self, temporary: Path, step: int, meta: dict) -> None:
        try:
            hashes = {name: checkpoint.write_tensors(temporary / name, t) for name, t in self.copy.files.items()}
            checkpoint.commit(temporary, self.root, step, meta, self.keep, hashes)
        except (OSError, checkpoint.CheckpointError) as e:
            self._error = e
            shutil.rmtree(temporary, ignore_errors=True)  # its space may be what is missing

    def wait(self, *, is_last: bool = False) -> None:
        """Until the checkpoint under way is on disk.

        Raises:
            StorageError: it is not, and there were too many of those, or none will follow.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            self.failures = 0
            return
        self.failures += 1
        if is_last or self.failures >= MOST_FAILURES:
            last = next(reversed(checkpoint.steps_on_disk(self.root)), None)
            raise StorageError(
                f"checkpoint of step {self._step}: {error}; "
                f"{'it was the last one' if is_last else f'{self.failures} saves in a row failed'}; make room in "
                f"{self.root}, then continue with --resume from {'nothing' if last is None else f'step {last}'}"
            ) from error
        self.say(
            f"warning   the checkpoint of step {self._step} failed ({self.failures} of {MOST_FAILURES}): {error}; "
            f"training goes on, the checkpoint before is kept"
        )

    def finish(self) -> None:
        """As `wait`, when the training has ended for another reason; says nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class Stored:
    """A verified checkpoint, read by rank 0 and handed to all: the other hosts need not see its disk.

    Every rank must ask for the same tensors in the same order.
    """

    def __init__(self, folder: Path | None, device: torch.device):
        self.device = device
        self._open = {}
        names = {}
        self._stack = ExitStack()
        if folder is not None:
            for path in sorted(folder.glob("*.safetensors")):
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                self._open[path.name] = file
                names[path.name] = sorted(file.keys())
        self.names: dict[str, list[str]] = json.loads(dist.broadcast_text(json.dumps(names), device))
        """Names of all tensors, by file."""

    def expect(self, file: str, names: Iterable[str]) -> None:
        """Raises CheckpointError if the file has tensors of other names."""
        wanted, found = set(names), set(self.names.get(file, ()))
        for what, difference in (("missing", wanted - found), ("not of this model", found - wanted)):
            if difference:
                raise checkpoint.CheckpointError(f"{file}: {min(difference)} is {what}; it is of another model")

    def get(self, file: str, name: str, like: Tensor) -> Tensor:
        """A tensor on the device; collective.

        Args:
            like: has the shape and the type that are expected.

        Raises:
            CheckpointError: it has others.
        """
        value = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if dist.is_main():
            stored = self._open[file].get_tensor(name)
            if stored.shape != like.shape or stored.dtype != like.dtype:
                raise checkpoint.CheckpointError(
                    f"{file}: expected {name} as {like.dtype} {tuple(like.shape)}, got {stored.dtype} "
                    f"{tuple(stored.shape)}; it is of another model"
                )
            value.copy_(stored)
        return dist.broadcast(value)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def stored(folder: Path, device: torch.device) -> Iterator[Stored]:
    """The checkpoint in `folder`, which only rank 0 looks into."""
    reader = Stored(folder if dist.is_main() else None, device)
    try:
        yield reader
    finally:
        reader.close()
