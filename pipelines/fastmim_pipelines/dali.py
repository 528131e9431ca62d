"""Training batches decoded and resized by NVIDIA DALI: our bytes, boxes and order; on the GPU, or without one on the CPU.

DALI's dynamic mode is called like a function, so nothing of a run's state is inside DALI.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .device_decode import DeviceLoader, DeviceReader, import_or_advise

PACKAGE = "nvidia-dali-cuda130"


class DaliReader(DeviceReader):
    """See DeviceReader."""

    name = "dali"

    def __init__(self, crops: Sequence[tuple[tuple[int, int], str]], in_chans: int):
        super().__init__(crops, in_chans)
        self._dynamic = import_or_advise("nvidia.dali.experimental.dynamic", PACKAGE, "dali")
        self._types = import_or_advise("nvidia.dali.types", PACKAGE, "dali")

    def decode(self, datas: list[np.ndarray], boxes: list[tuple[int, int, int, int]], sizes: list[tuple[int, int]]):
        try:
            return self._decode(datas, boxes, sizes)
        except RuntimeError:
            # One bad file fails the batch. Which one it is shows when each is asked for alone.
            if len(datas) == 1:
                return [[None] for _ in sizes]
            alone = [self.decode([data], [box], sizes) for data, box in zip(datas, boxes)]
            return [[pictures[k][0] for pictures in alone] for k in range(len(sizes))]

    def _decode(self, datas: list[np.ndarray], boxes: list[tuple[int, int, int, int]], sizes: list[tuple[int, int]]):
        dynamic, types = self._dynamic, self._types
        if self.device.type == "cuda":
            dynamic.set_current_stream(torch.cuda.current_stream())  # of this thread
        starts = dynamic.as_batch([np.array([top, left], np.int32) for left, top, _, _ in boxes])
        shapes = dynamic.as_batch([np.array([height, width], np.int32) for _, _, width, height in boxes])
        regions = dynamic.decoders.image_slice(
            dynamic.as_batch(datas), start=starts, shape=shapes, axis_names="HW", output_type=types.RGB,
            adjust_orientation=False, device="gpu" if self.device.type == "cuda" else "cpu",
        )  # fmt: skip
        resized = [
            dynamic.resize(regions, size=size, interp_type=types.INTERP_CUBIC, antialias=True).torch() for size in sizes
        ]
        return [list(batch.to(torch.uint8).permute(0, 3, 1, 2)) for batch in resized]


class DaliLoader(DeviceLoader):
    """See DeviceLoader."""

    reader_class = DaliReader
