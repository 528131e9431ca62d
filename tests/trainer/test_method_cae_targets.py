"""CAE's masks, crops and tokens."""

import math
import sys

import fastmim_kernels as fk
import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from slow_cae import Brightness, build, make_batch
from slow_reference import cut_view, draw_flips, make_rng, model_spec

from fastmim.config import ConfigError
from fastmim.flops import training_flops
from fastmim.methods import cae
from fastmim.tokenizer import DalleEncoder, RecordedTarget, record_tokens

# ---- masks and crops


def test_cae_masks_98_of_196_patches_in_blocks(small):
    method = build((224, 224, 16, 3))
    assert (method.mask.num_masked, method.mask.min_block) == (98, 16)
    ids, rng = torch.arange(600), make_rng()
    plan = method.mask(rng, ids)
    for a, b in zip(plan, fk.block_masking(rng, ids, (14, 14), 98), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plan.mask.sum(1), torch.full((600,), 98.0))
    assert torch.equal(plan.ids_masked, plan.ids_masked.sort(1).values)
    share = plan.mask.mean(0).view(14, 14)
    # Five standard errors of 600 masks, and the scatter of the published numbers.
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item() == pytest.approx(0.06, abs=0.03)
    assert share[6:8, 6:8].mean().item() == pytest.approx(0.86, abs=0.07)


def test_cae_random_masks_hide_98_of_196_patches_everywhere_alike(small):
    method = build((224, 224, 16, 3), mask="random")
    ids, rng = torch.arange(600), make_rng()
    plan = method.mask(rng, ids)
    assert plan.ids_keep.shape == plan.ids_masked.shape == (600, 98)
    assert torch.equal(plan.mask.sum(1), torch.full((600,), 98.0))
    # Binomial: sqrt(.25 / 600) = .0204; five of them.
    assert (plan.mask.mean(0) - 0.5).abs().max() < 0.1
    # As many as in blocks where the ratio does not divide the patches.
    few = build((224, 224, 16, 3), mask="random", mask_ratio=0.38).mask(rng, ids)
    assert few.ids_masked.shape == (600, 75)


@pytest.mark.parametrize(
    "shape, ratio, masked, min_block",
    [((224, 224, 16, 3), 0.38, 75, 16), ((48, 48, 12, 3), 0.5, 8, 1), ((64, 96, 16, 3), 0.5, 12, 2),
     ((40, 56, 8, 3), 0.5, 18, 3), ((256, 256, 16, 3), 0.5, 128, 21)],
)  # fmt: skip
def test_cae_blocks_scale_with_the_grid(small, shape, ratio, masked, min_block):
    method = build(shape, mask_ratio=ratio)
    assert (method.mask.num_masked, method.mask.min_block) == (masked, min_block)
    assert method.mask(make_rng(), torch.arange(3)).ids_masked.shape == (3, masked)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_cae_refuses_to_mask_nothing_or_everything(small, ratio):
    with pytest.raises(ConfigError, match="mask ratio"):
        build(mask_ratio=ratio)


def test_cae_asks_for_one_crop_with_pixels_and_two_of_one_box_with_tokens(small):
    plain = CropSpec(size=(224, 224), scale=(0.08, 1.0))
    assert build((224, 224, 16, 3)).crops == (plain,)
    network = DalleEncoder(3, 8, 1, 30)
    half = CropSpec(size=(112, 112), scale=(0.08, 1.0), filter="lanczos")
    assert build((224, 224, 16, 3), tokenizer=network).crops == (plain, half)
    assert plain.view == half.view and plain.ratio == half.ratio, "one box"
    # A token per patch on any grid: 8 pixels of the d-VAE for each.
    assert build((48, 72, 12, 3), tokenizer=network, crop_scale=(0.5, 1.0)).crops[1] == CropSpec(
        size=(32, 48), scale=(0.5, 1.0), filter="lanczos"
    )


def test_cae_tokenizes_the_mirrored_second_crop_at_the_masked_patches(small):
    tokenizer = Brightness()
    method = build(tokenizer=tokenizer)
    batch, rng = make_batch(method, 6), make_rng()
    method(batch, rng)
    ((images, ids),) = tokenizer.seen
    flips = draw_flips(rng, batch.ids)
    assert set(flips) == {True, False}
    for image, crop, flip in zip(images, batch.crops[1], flips, strict=True):
        exact = cut_view(crop, crop.shape[1:], 0, 0, flip, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(image.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(ids, method.mask(rng, batch.ids).ids_masked)


# ---- tokens


def test_cae_tokenizers_run_outside_of_autocast(small):
    """Any tokenizer's, not only the d-VAE's: in low precision it would give other ids than a recording."""
    asked = []

    class Watched(Brightness):
        def forward(self, images, ids=None):
            asked.append(torch.is_autocast_enabled("cpu"))
            return super().forward(images, ids)

    method = build(tokenizer=Watched())
    with torch.autocast("cpu", torch.bfloat16):
        method(make_batch(method), make_rng())
    assert asked == [False]


def test_cae_cross_entropy_starts_at_the_log_of_8192(small):
    torch.manual_seed(0)
    method = cae.CAE(model_spec(), cae.Config(), Brightness(8192))
    token = method(make_batch(method, 8), make_rng()).parts["token"].item()
    assert token == pytest.approx(math.log(8192), abs=0.1) == pytest.approx(9.01, abs=0.1)


def test_cae_tokenizer_is_no_part_of_what_is_trained(small):
    tokenizer = DalleEncoder(3, 8, 1, 30)
    method = build(tokenizer=tokenizer)
    names = [n for n, _ in method.named_parameters()]
    assert not any("token" in n and not n.endswith(("cls_token", "mask_token")) for n in names)
    assert set(method.state_dict()) == set(names)
    before = {n: t.clone() for n, t in tokenizer.state_dict().items()}
    output = method(make_batch(method), make_rng())
    output.loss.backward()
    assert all(torch.equal(t, before[n]) for n, t in tokenizer.state_dict().items())
    assert not tokenizer.training


def test_cae_takes_the_published_file(small, tmp_path):
    network = DalleEncoder(3, 8, 1, 30)
    torch.save(network.state_dict(), tmp_path / "encoder.pkl")
    for path in (tmp_path / "encoder.pkl", str(tmp_path / "encoder.pkl")):  # a checkpoint's options hold text
        method, given = build(tokenizer=None, tokenizer_file=path), build(tokenizer=network)
        assert method.notes == () and method.decoder.head.out_features == 30
        batch, rng = make_batch(method), make_rng()
        assert torch.equal(method(batch, rng).loss, given(batch, rng).loss)


def test_cae_trains_on_recorded_tokens_without_tokenizer_and_second_crop(small, tmp_path):
    network = DalleEncoder(3, 8, 1, 30)
    torch.save(network.state_dict(), tmp_path / "encoder.pkl")
    live = build(tokenizer=network)
    batch, rng = make_batch(live), make_rng(step=11)

    class Loader:
        steps_per_epoch = 20

        def epoch(self, epoch, start_step=0):
            yield from [batch] * (20 - start_step)

    folder = tmp_path / "tokens"
    record_tokens(folder, Loader(), network, live.model, seed=3, steps=range(11, 13), device=torch.device("cpu"))
    for options in (dict(), dict(tokenizer_file=tmp_path / "encoder.pkl")):
        method = build(tokens=folder, **options)
        assert isinstance(method.tokens, RecordedTarget) and len(method.crops) == 1
        assert torch.equal(method(Batch(batch.crops[:1], batch.ids), rng).loss, live(batch, rng).loss)
    with pytest.raises(ConfigError, match="expected seed 4, got 3"):
        method(batch, make_rng(seed=4, step=11))


@pytest.mark.parametrize("target", ["auto", "pixel", "dvae"])
def test_cae_without_tokenizer_says_what_it_predicts_instead(small, target):
    if target == "dvae":
        with pytest.raises(ConfigError, match=r"--cae.target dvae: expected --cae.tokenizer .* got none"):
            build(target=target)
        return
    method = build(target=target)
    assert method.decoder.head.out_features == 48
    assert len(method.notes) == (target == "auto")
    if target == "auto":
        assert "predicts pixels" in method.notes[0] and "--cae.tokenizer" in method.notes[0]


def test_cae_refuses_a_tokenizer_of_other_channels_and_a_missing_one(small, tmp_path):
    torch.save(DalleEncoder(1, 8, 1, 30).state_dict(), tmp_path / "e.pkl")
    with pytest.raises(ConfigError, match=r"--in-chans: expected 1, which the tokenizer .* takes, got 3"):
        build(tokenizer_file=tmp_path / "e.pkl")
    with pytest.raises(ConfigError, match=r"tokenizer: expected the file .*, got none there; download https"):
        build(tokenizer_file=tmp_path / "none.pkl")
    assert build(tokenizer_file=tmp_path / "none.pkl", target="pixel").tokens is None


OWN = """
import torch

class Steps(torch.nn.Module):
    def __init__(self, stride=3, vocabulary=7, shape=None):
        super().__init__()
        self.stride, self.vocabulary, self.shape = stride, vocabulary, shape
        self.weight = torch.nn.Parameter(torch.rand(5))

    def forward(self, images, ids=None):
        squares = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.stride).flatten(1)
        tokens = (squares * 6.99).long()
        return (tokens if ids is None else tokens.gather(1, ids)).reshape(self.shape or (len(images), -1))

flat = lambda: Steps(shape=(-1,))
few = lambda: Steps(vocabulary=3)
fractional = lambda: Steps(stride=1.5)
broken = lambda: 1 / 0
images_only = lambda: torch.nn.Identity()
"""


@pytest.fixture
def own_tokenizers(tmp_path, monkeypatch):
    (tmp_path / "own_tokenizers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    # The working directory is added by the code.
    monkeypatch.setattr("sys.path", list(sys.path))
    yield
    sys.modules.pop("own_tokenizers", None)


def test_cae_takes_a_tokenizer_by_the_name_of_the_function_that_makes_it(small, own_tokenizers):
    method = build(tokenizer_file="own_tokenizers:Steps")
    assert method.decoder.head.out_features == 7 and method.crops[1].size == (12, 18)
    batch, rng = make_batch(method, 6), make_rng()
    # What the function draws shifts no random number of the method's own weights.
    given = build(tokenizer=sys.modules["own_tokenizers"].Steps())
    assert torch.equal(method(batch, rng).loss, given(batch, rng).loss)
    assert type(method.tokens.network).__name__ == "Steps" and not method.tokens.network.training
    assert training_flops("cae", method.model, method.config).terms[-1].name == "target bridge"


@pytest.mark.parametrize(
    "name, message",
    [("flat", r"ids \(1, 2\) torch.int64 of two patches of an image, got \(2,\) torch.int64"),
     ("few", r"expected ids in 0 .. 2, got 3 .. 3"),
     ("fractional", r"`stride` is a positive integer, got Steps with 1.5"),
     ("images_only", r"`vocabulary` is a positive integer, got Identity with None"),
     ("broken", "expected a function that makes a tokenizer: ZeroDivisionError: division by zero"),
     ("missing", "expected a function that makes a tokenizer: AttributeError")],
)  # fmt: skip
def test_cae_says_what_is_wrong_with_a_tokenizer_of_the_user(small, own_tokenizers, name, message):
    with pytest.raises(ConfigError, match=f"--cae.tokenizer own_tokenizers:{name}: .*{message}"):
        build(tokenizer_file=f"own_tokenizers:{name}")


def test_cae_names_the_module_of_a_tokenizer_that_is_not_there(small):
    with pytest.raises(ConfigError, match=r"--cae.tokenizer no_such_module:make: .* No module named 'no_such_module'"):
        build(tokenizer_file="no_such_module:make")


def test_cae_starts_regressor_and_decoder_at_a_layer_scale_of_their_own(small):
    method = build(layer_scale=1e-5, decoder_layer_scale=0.1)
    factors = {n: p for n, p in cae.CAE(method.model, method.config).named_parameters() if "gamma" in n}
    assert {n.split(".")[0] for n in factors} == {"encoder", "regressor", "decoder"}
    for name, factor in factors.items():
        expected = 1e-5 if name.startswith("encoder") else 0.1
        assert torch.equal(factor, torch.full_like(factor, expected)), name


def test_cae_refuses_a_decoder_width_that_its_heads_do_not_divide(small):
    with pytest.raises(ConfigError, match="decoder_width: expected a multiple of 4 and of 3 heads, got 40"):
        build(decoder_width=40)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(regressor_depth=0), "--cae.regressor-depth: expected at least 1, finite, got 0"),
        (dict(decoder_depth=-1), "--cae.decoder-depth: expected at least 0, finite, got -1"),
        (dict(drop_path=1.0), "drop_path: expected 0 <= rate < 1, got 1.0"),
        (dict(drop_path=-0.1), "drop_path"),
    ],
    ids=range(4),
)
def test_cae_refuses_options_out_of_range(small, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
