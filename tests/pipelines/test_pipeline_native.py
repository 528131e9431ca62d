"""The native decoder gives Pillow's pixels, bit for bit."""

import io

import numpy as np
import pytest
from bad_files import PILLOW_WARNS
from fastmim_pipelines.decode import CropReader
from fastmim_pipelines.native_decode import FILTERS, FileSpan
from native_decoding import (
    DECODER,
    DONE,
    OTHER_KIND,
    by_pillow,
    jpeg,
    natively,
    needs_native,
    picture,
    segment,
    with_segments,
)
from PIL import Image

pytestmark = [pytest.mark.usefixtures("unforced"), *PILLOW_WARNS]


def random_box(rng, width, height, is_whole: bool):
    w, h = rng.uniform(1, width + 0.01), rng.uniform(1, height + 0.01)
    w, h = min(w, width), min(h, height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return tuple(map(int, (left, top, w, h))) if is_whole else (left, top, w, h)


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def instructions(request):
    """Each version of the resampler that this processor can run."""
    DECODER._library.fastmim_decode_use_instructions(request.param)
    yield
    DECODER._library.fastmim_decode_use_instructions(2)


@needs_native
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"subsampling": 2, "restart_marker_blocks": 3}),
        ("RGB", {"subsampling": 2, "progressive": True}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
    ids=str,
)
def test_native_pixels_are_pillows(mode, options, filter, instructions):
    rng = np.random.default_rng(len(str(options)))
    for trial in range(6):
        width, height = int(rng.integers(1, 200)), int(rng.integers(1, 200))
        data = jpeg(picture(rng, width, height, mode), quality=int(rng.integers(40, 97)), **options)
        for in_chans in (1, 3):
            box = random_box(rng, width, height, is_whole=trial % 2 == 0)
            size = (int(rng.integers(1, 120)), int(rng.integers(1, 120)))
            out, status = natively([data], [box], size, filter, in_chans)
            assert status == [DONE]
            assert np.array_equal(out[0], by_pillow(data, box, size, filter, in_chans)), (width, height, box, size)


@needs_native
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (0.5, 0.5), (1, 0)], ids=str)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_native_region_at_any_place_equals_the_whole_decode(subsampling, place):
    """Without resizing, so that every pixel of the region is seen, along all its borders."""
    rng = np.random.default_rng(subsampling)
    data = jpeg(picture(rng, 131, 117), subsampling=subsampling, quality=80)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    for width, height in ((1, 1), (16, 16), (17, 33), (50, 40), (131, 117)):
        left, top = int(place[0] * (131 - width)), int(place[1] * (117 - height))
        out, _ = natively([data], [(left, top, width, height)], (height, width))
        assert np.array_equal(out[0], whole[:, top : top + height, left : left + width])


@needs_native
def test_native_reads_unusual_sampling_and_color(tmp_path):
    rng = np.random.default_rng(3)
    data = jpeg(picture(rng, 90, 70), subsampling=0, quality=90)
    frame = data.index(b"\xff\xc0") + 10
    for luma, chroma in ((0x12, 0x11), (0x41, 0x11), (0x22, 0x21), (0x11, 0x22)):
        # Other factors in the header than the data were made with: damaged, or another picture, but the same to both.
        changed = bytearray(data)
        changed[frame + 1], changed[frame + 4] = luma, chroma
        reader = CropReader([((20, 30), "bicubic")], 3)
        outs = [np.zeros((1, 3, 20, 30), np.uint8) for _ in range(2)]
        (first,) = reader.read([bytes(changed)], ["x"], lambda i, w, h: [(0, 0, w, h)], [outs[0]])
        reader.uses_native = False
        (second,) = reader.read([bytes(changed)], ["x"], lambda i, w, h: [(0, 0, w, h)], [outs[1]])
        assert str(first) == str(second) and np.array_equal(*outs)
    for transform in (0, 1):  # RGB stored as such, and as YCbCr
        marked = with_segments(data, segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])))
        out, status = natively([marked], [(5, 6, 70, 50)], (33, 44))
        assert status == [DONE] and np.array_equal(out[0], by_pillow(marked, (5, 6, 70, 50), (33, 44)))


@needs_native
def test_native_cuts_several_crops_from_one_decode_in_any_number_of_threads(tmp_path):
    rng = np.random.default_rng(0)
    datas = [jpeg(picture(rng, int(w), int(h))) for w, h in rng.integers(20, 120, (13, 2))]
    (tmp_path / "all").write_bytes(b"".join(datas))
    for i, data in enumerate(datas):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    offsets = np.cumsum([0, *map(len, datas)]).tolist()
    boxes = rng.uniform(1, 15, (3, 13, 4))
    sizes, filters = ((24, 31), (7, 90), (64, 64)), ("bicubic", "bilinear", "lanczos")
    with open(tmp_path / "all", "rb") as file:
        kinds = {
            "bytes": datas,
            "views": [memoryview(data) for data in datas],
            "arrays": [np.frombuffer(data, np.uint8) for data in datas],
            "mixed": [data if i % 3 else str(tmp_path / f"{i}.jpg") for i, data in enumerate(datas)],
            "paths": [str(tmp_path / f"{i}.jpg") for i in range(13)],
            "spans": [
                FileSpan(str(tmp_path / "all"), offsets[i], len(data), file.fileno() if i % 2 else -1)
                for i, data in enumerate(datas)
            ],
        }
        for name, images in kinds.items():
            for threads in (1, 3, 50):
                outs = [np.zeros((13, 3, *size), np.uint8) for size in sizes]
                expected = [OTHER_KIND if name == "mixed" and i % 3 == 0 else DONE for i in range(13)]
                with DECODER.open(images, threads) as batch:
                    assert batch.status.tolist() == expected
                    batch.crop(boxes, filters, outs)
                    assert batch.status.tolist() == expected
                for k in range(3):
                    for i in np.flatnonzero(np.array(expected) == DONE).tolist():
                        data = datas[i]
                        assert np.array_equal(outs[k][i], by_pillow(data, boxes[k, i], sizes[k], filters[k]))


@needs_native
def test_native_clamps_boxes_as_the_pillow_path_does():
    rng = np.random.default_rng(1)
    data = jpeg(picture(rng, 40, 30))
    for box in (
        (-5, -5, 20, 20), (30, 20, 100, 100), (0, 0, 1e9, 1e9), (100, 100, 5, 5), (10, 10, 0, 0), (3, 3, -7, 1), (39.9999999, 0, 1, 1),
    ):  # fmt: skip
        out, status = natively([data], [box], (9, 11))
        assert status == [DONE] and np.array_equal(out[0], by_pillow(data, box, (9, 11))), box


@needs_native
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (8, 8), (17, 1)], ids=str)
def test_native_reads_pictures_of_any_shape(size):
    data = jpeg(picture(np.random.default_rng(2), *size))
    for box in ((0, 0, *size), (size[0] - 1, size[1] - 1, 1, 1)):
        for out_size in ((1, 1), (5, 70)):
            out, status = natively([data], [box], out_size)
            assert status == [DONE] and np.array_equal(out[0], by_pillow(data, box, out_size))
