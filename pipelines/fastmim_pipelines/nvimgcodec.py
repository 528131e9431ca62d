"""Training batches decoded by NVIDIA nvImageCodec: a small package, in which a bad image fails alone.

It decodes the box; torch resizes it, on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .device_decode import DeviceLoader, DeviceReader, import_or_advise

PACKAGE = "nvidia-nvimgcodec-cu13"


class NvimgcodecReader(DeviceReader):
    """See DeviceReader."""

    name = "nvimgcodec"

    def __init__(self, crops: Sequence[tuple[tuple[int, int], str]], in_chans: int):
        super().__init__(crops, in_chans)
        self._codec = import_or_advise("nvidia.nvimgcodec", PACKAGE, "nvimgcodec")
        self._decoder = None

    def decode(self, datas: list[np.ndarray], boxes: list[tuple[int, int, int, int]], sizes: list[tuple[int, int]]):
        codec = self._codec
        if self._decoder is None:  # here: in the thread that uses it
            self._decoder = self._new_decoder()
        parameters = codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)
        streams = [
            codec.CodeStream(data.tobytes()).get_sub_code_stream(
                region=codec.Region(start=[top, left], end=[top + height, left + width])
            )
            for data, (left, top, width, height) in zip(datas, boxes)
        ]
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        decoded = self._decoder.decode(streams, params=parameters, cuda_stream=stream)
        regions = [None if image is None else self._tensor(image) for image in decoded]
        return [[None if region is None else _resize(region, size) for region in regions] for size in sizes]

    def _new_decoder(self):
        codec = self._codec
        if self.device.type == "cuda":
            return codec.Decoder(device_id=torch.cuda.current_device())
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        return codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)

    def _tensor(self, image: Any) -> Tensor:
        """(height, width, 3) on `device`."""
        if self.device.type == "cuda":
            return torch.from_dlpack(image)
        return torch.from_numpy(np.array(image.cpu() if hasattr(image, "cpu") else image))


def _resize(region: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (h, w, 3) -> uint8 (3, height, width), antialiased bicubic with a = -1/2 as Pillow's."""
    planes = region.permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


class NvimgcodecLoader(DeviceLoader):
    """See DeviceLoader."""

    reader_class = NvimgcodecReader
