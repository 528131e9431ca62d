"""Options that no method can work with are refused when it is built, by one line that names them."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from fastmim.config import ConfigError, TrainConfig
from fastmim.methods.base import available, build, find
from fastmim.views import ColorConfig

MODEL = TrainConfig(model="vit_pico", image_size=32, patch_size=8).model_spec()
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mae", dict(mask_ratio=0.0), "mask ratio: expected at least 1 of 16 patches or cells to be masked, got ratio 0.0"),
        ("mae", dict(mask_ratio=NAN), "--mae.mask-ratio: expected a finite number, got nan"),
        ("mae", dict(crop_scale=(0.2, INFINITY)), "--mae.crop-scale: expected a finite number, got inf"),
        ("mae", dict(crop_scale=(0.5, 0.2)), "--mae.crop-scale: expected 0 < low <= high <= 1, got 0.5 0.2"),
        ("simmim", dict(crop_scale=(0.0, 1.0)), "--simmim.crop-scale: expected 0 < low <= high <= 1, got 0 1"),
        ("mae", dict(decoder_depth=0), "decoder depth: expected at least 1 block, got 0"),
        ("mixedae", dict(decoder_heads=0), "decoder_heads: expected a positive multiple of 4 .*, got 512 and 0"),
        ("mixedae", dict(decoder_width=6, decoder_heads=1), "decoder_heads: expected a positive multiple of 4 .*, got 6 and 1"),
        ("cmae", dict(temperature=0.0), "--cmae.temperature: expected a finite number above 0, got 0"),
        ("cmae", dict(momentum=1.5), "--cmae.momentum: expected a number in 0 .. 1, got 1.5"),
        ("cmae", dict(shift=-1), "--cmae.shift: expected at least 0, finite, got -1"),
        ("cmae", dict(head_out=0), "head_hidden, head_out: expected at least 1 channel, got 0"),
        ("cmae", dict(color=ColorConfig(hue=3.0)), "--cmae.color.hue: expected 0 .. 0.5, got 3.0"),
        ("icmae", dict(color=ColorConfig(blur_sigma=(0.0, 0.0))), "--icmae.color.blur-sigma: expected 0 <= smallest"),
        ("icmae", dict(color=ColorConfig(contrast=NAN)), "--icmae.color.contrast: expected a finite number, got nan"),
        ("icmae", dict(temperature=-1.0), "--icmae.temperature: expected a finite number above 0, got -1"),
        ("icmae", dict(momentum=(0.9, 2.0)), "--icmae.momentum: expected a number in 0 .. 1, got 2"),
        ("icmae", dict(crop_alpha=0.0), "--icmae.crop-alpha: expected a number above 0, up to 1, got 0"),
        ("cae", dict(decoder_layer_scale=-1.0), "--cae.decoder-layer-scale: expected at least 0, finite, got -1"),
        ("cae", dict(align_weight=-1.0), "--cae.align-weight: expected at least 0, finite, got -1"),
        ("cae", dict(layer_scale=-1.0), "--cae.layer-scale: expected at least 0, finite, got -1"),
        ("simmim", dict(drop_path=1.0), "--simmim.drop-path: expected 0 <= rate < 1, got 1.0"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else "-".join(value),
)  # fmt: skip
def test_an_option_out_of_range_is_named(method, options, message):
    config = dataclasses.replace(find(method).Config(), **options)
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        build(method, MODEL, config, 0)
    assert "\n" not in str(caught.value)


# ---- docs/methods.md says of every option what it rests on


def choices(hint) -> set[str]:
    """The words that an option of this type takes."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return set().union(*map(choices, get_args(hint))) if get_origin(hint) in (Union, types.UnionType) else set()


@pytest.mark.parametrize("method", available())
def test_every_option_and_every_choice_is_documented(method):
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (section,) = re.findall(rf"^## `{method}`.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    named = {word for quoted in re.findall(r"`([^`]+)`", section) for word in re.split(r"[ .]", quoted)}
    hints = get_type_hints(find(method).Config)
    assert set(hints) <= named
    missing = {f"{name} {choice}" for name, hint in hints.items() for choice in choices(hint) - named}
    assert not missing
    # Nor does the page know options that there are not.
    known = {name.removeprefix("no-") for name in hints}
    flags = set(re.findall(rf"--{method}\.([\w-]+)", text))
    assert {flag.removeprefix("no-").replace("-", "_") for flag in flags} <= known
