"""The command line: its flags are frozen, presets and files layer as documented, mistakes get one clear line."""

import shutil
from pathlib import Path

import pytest
import yaml

from fastmim.arguments import flag_names, parse_train
from fastmim.config import ConfigError, from_plain, to_plain
from fastmim.methods import base, cmae, mae
from fastmim.run_directory import CONFIG_FILE, RUNS, RunDirectory

# Scripts rely on these. Adding a flag means adding it here; removing or renaming one breaks users.
FROZEN = [
    "--accumulate",
    "--base-lr",
    "--batch-size",
    "--betas",
    "--checkpointing",
    "--clip",
    "--compile",
    "--config",
    "--contrast-batch",
    "--data",
    "--device",
    "--dry-run",
    "--engine",
    "--epochs",
    "--exclude",
    "--fp8",
    "--graph",
    "--hang-after",
    "--image-size",
    "--in-chans",
    "--keep",
    "--knn-every",
    "--loader",
    "--log-every",
    "--lr",
    "--lr-end",
    "--mean",
    "--method",
    "--model",
    "--on-bad-image",
    "--out",
    "--patch-size",
    "--precision",
    "--preset",
    "--reconstruct-every",
    "--resume",
    "--save-every",
    "--schedule",
    "--seed",
    "--skip-budget",
    "--std",
    "--stem",
    "--steps",
    "--tracker",
    "--val-data",
    "--warmup",
    "--warmup-start",
    "--weight-decay",
    "--workers",
    "--zero",
    "--zero-offload",
]
FROZEN_OPTIONS = {
    "mae": [
        "--mae.crop-scale",
        "--mae.decoder-depth",
        "--mae.decoder-heads",
        "--mae.decoder-width",
        "--mae.mask-ratio",
        "--mae.norm-pix",
    ],
    "cmae": [
        "--cmae.color.blur-probability",
        "--cmae.color.blur-sigma",
        "--cmae.color.brightness",
        "--cmae.color.contrast",
        "--cmae.color.grey-probability",
        "--cmae.color.hue",
        "--cmae.color.jitter-probability",
        "--cmae.color.saturation",
        "--cmae.contrast-weight",
        "--cmae.crop-scale",
        "--cmae.decoder-heads",
        "--cmae.decoder-width",
        "--cmae.feature-decoder-depth",
        "--cmae.head-hidden",
        "--cmae.head-out",
        "--cmae.mask-cell",
        "--cmae.mask-ratio",
        "--cmae.momentum",
        "--cmae.pixel-decoder-depth",
        "--cmae.pixel-weight",
        "--cmae.shift",
        "--cmae.temperature",
    ],
    "cae": [
        "--cae.align-weight",
        "--cae.crop-scale",
        "--cae.decoder-depth",
        "--cae.decoder-heads",
        "--cae.decoder-layer-scale",
        "--cae.decoder-width",
        "--cae.drop-path",
        "--cae.init",
        "--cae.layer-scale",
        "--cae.mask",
        "--cae.mask-ratio",
        "--cae.norm-pix",
        "--cae.regressor-depth",
        "--cae.target",
        "--cae.tokenizer",
        "--cae.tokens",
    ],
    "icmae": [
        "--icmae.box-updates",
        "--icmae.color.blur-probability",
        "--icmae.color.blur-sigma",
        "--icmae.color.brightness",
        "--icmae.color.contrast",
        "--icmae.color.grey-probability",
        "--icmae.color.hue",
        "--icmae.color.jitter-probability",
        "--icmae.color.saturation",
        "--icmae.contrast",
        "--icmae.contrast-weight",
        "--icmae.crop",
        "--icmae.crop-alpha",
        "--icmae.crop-scale",
        "--icmae.decoder-depth",
        "--icmae.decoder-heads",
        "--icmae.decoder-width",
        "--icmae.first-crop",
        "--icmae.freeze-patch-embed",
        "--icmae.head-hidden",
        "--icmae.head-out",
        "--icmae.heat",
        "--icmae.mask-ratio",
        "--icmae.mask-share",
        "--icmae.momentum",
        "--icmae.norm-pix",
        "--icmae.pos-drop",
        "--icmae.position",
        "--icmae.position-weight",
        "--icmae.second-view",
        "--icmae.temperature",
    ],
    "mixedae": [
        "--mixedae.cls-mode",
        "--mixedae.contrast-weight",
        "--mixedae.crop-scale",
        "--mixedae.decoder-depth",
        "--mixedae.decoder-heads",
        "--mixedae.decoder-width",
        "--mixedae.diagnostics",
        "--mixedae.homo-layers",
        "--mixedae.homologous",
        "--mixedae.members",
        "--mixedae.mode",
        "--mixedae.norm-pix",
        "--mixedae.projection",
        "--mixedae.temperature",
        "--mixedae.topk",
        "--mixedae.use-segments",
    ],
    "simmim": [
        "--simmim.crop-scale",
        "--simmim.drop-path",
        "--simmim.layer-scale",
        "--simmim.mask-cell",
        "--simmim.mask-ratio",
        "--simmim.norm-pix",
    ],
}


@pytest.mark.parametrize("method", FROZEN_OPTIONS)
def test_flags_are_frozen(method):
    assert flag_names(method) == sorted(FROZEN + FROZEN_OPTIONS[method])


@pytest.mark.parametrize("name", FROZEN)
def test_flags_do_not_clash_with_launcher_prefixes(name):
    # The launchers' own parsers refuse abbreviations of several of their options.
    assert name not in ("--no", "--num", "--bind", "--m", "--d")


def test_defaults_are_the_demo_preset():
    config = parse_train([])
    assert (config.method, config.preset, config.model, config.options) == (
        "cmae", "demo", "vit_pico", cmae.PRESETS["demo"].options)  # fmt: skip


def test_data_selects_the_paper_preset():
    config = parse_train(["--method", "mae", "--data", "photos"])
    assert (config.preset, config.batch_size, config.model, config.image_size) == ("paper", 4096, "vit_base", 224)
    assert config.data == Path("photos")
    assert config.options == mae.PRESETS["paper"].options
    assert config.peak_lr == pytest.approx(2.4e-3)
    assert parse_train(["--data", "photos", "--preset", "demo"]).preset == "demo"


def test_huge_model_brings_its_patch_size():
    assert parse_train(["--data", "d", "--model", "vit_huge"]).patch_size == 14
    assert parse_train(["--data", "d", "--model", "vit_huge", "--patch-size", "16"]).patch_size == 16


def test_values_are_typed():
    config = parse_train(
        [
            "--image-size",
            "32",
            "48",
            "--mean",
            "0.1",
            "0.2",
            "--std",
            "1",
            "2",
            "--in-chans",
            "2",
            "--cmae.temperature",
            "0.2",
            "--cmae.shift",
            "3",
            "--cmae.color.blur-sigma",
            "0.2",
            "0.3",
            "--steps",
            "7",
            "--zero",
            "2",
            "--clip",
            "1",
            "--dry-run",
        ]
    )
    assert config.image_size == (32, 48)
    assert (config.mean, config.std) == ((0.1, 0.2), (1.0, 2.0))
    assert (config.options.temperature, config.options.shift) == (0.2, 3)
    assert config.options.color.blur_sigma == (0.2, 0.3)
    assert (config.steps, config.epochs, config.zero, config.clip, config.dry_run) == (7, None, 2, 1.0, True)


def test_equals_sign_underscores_and_launcher_rank_are_accepted():
    config = parse_train(["--local_rank=3", "--batch_size=64", "--image-size=32", "--local_rank", "1", "--seed", "5"])
    assert (config.batch_size, config.image_size, config.seed) == (64, 32, 5)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], None), (["--resume"], "latest"), (["--resume", "--seed", "1"], "latest"), (["--resume", "12"], "12"),
     (["--resume=auto"], "auto")],
    ids=str,
)  # fmt: skip
def test_resume_takes_an_optional_step(argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_train(argv).resume == expected


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [(["--batchsize", "3"], "--batch-size"), (["--cmae.temprature", "1"], "--cmae.temperature"),
     (["--lerning-rate", "1"], None), (["--method", "mae", "--cmae.shift", "1"], None)],
    ids=lambda v: str(v),
)  # fmt: skip
def test_unknown_flag_names_the_nearest(argv, nearest):
    with pytest.raises(ConfigError) as error:
        parse_train(argv)
    assert argv[-2] in str(error.value)
    if nearest:
        assert f"did you mean {nearest}?" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--method", "mea"], "mae"), (["--preset", "papr"], "paper"), (["--config", "nowhere.yaml"], "nowhere.yaml")],
    ids=lambda v: str(v),
)
def test_unknown_method_preset_and_file(argv, words):
    with pytest.raises(ConfigError, match=words):
        parse_train(argv)


def test_config_file_overlays_the_preset_and_flags_overlay_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    # 1e-3 without a dot is a string to YAML; it must still arrive as a number.
    file.write_text(
        "lr: 1e-3\nbatch_size: 32\nsteps: 9\nimage-size: [32, 48]\ncmae: {temperature: 0.5, color: {hue: 0.2}}\n"
    )
    config = parse_train(["--config", str(file), "--batch-size", "16"])
    assert (config.lr, config.batch_size, config.steps, config.epochs) == (1e-3, 16, 9, None)
    assert (config.image_size, config.options.temperature, config.options.color.hue) == ((32, 48), 0.5, 0.2)
    assert parse_train(["--config", str(file), "--epochs", "2"]).steps is None


def test_config_file_with_unknown_key_is_an_error(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("batchsize: 3\n")
    with pytest.raises(ConfigError, match=r"--batchsize: .*--batch-size"):
        parse_train(["--config", str(file)])


def test_resume_reads_the_run_own_config(tmp_path):
    original = parse_train(
        ["--method", "mae", "--data", "photos", "--steps", "5", "--mae.mask-ratio", "0.5", "--lr", "0.1"]
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG_FILE).write_text(yaml.safe_dump(to_plain(original)))
    again = parse_train(["--out", str(run), "--resume", "--log-every", "3"])
    assert (again.method, again.options.mask_ratio, again.steps, again.epochs) == ("mae", 0.5, 5, None)
    assert (again.data, again.lr, again.log_every, again.out, again.resume) == (Path("photos"), 0.1, 3, run, "latest")


def test_bare_resume_finds_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("cmae-20260101-000000", 1), ("cmae-20260102-000000", 2), ("mae-20270101-000000", 3)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        config = parse_train(["--method", name.partition("-")[0], "--seed", str(seed)])
        (tmp_path / "runs" / name / CONFIG_FILE).write_text(yaml.safe_dump(to_plain(config)))
    assert parse_train(["--resume"]).seed == 3 and parse_train(["--resume"]).method == "mae"
    assert parse_train(["--method", "cmae", "--resume"]).seed == 2


def test_the_newest_run_is_the_last_that_was_started_whatever_clocks_and_copies_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The clock was set back before the second run; names and times of files say otherwise.
    for name, seed in (("mae-20270101-000000", 1), ("mae-20260101-000000", 2)):
        directory = RunDirectory(RUNS / name, resuming=False)
        directory.write_config(parse_train(["--method", "mae", "--seed", str(seed)]))
        directory.close()
    assert parse_train(["--method", "mae", "--resume"]).seed == 2
    shutil.copytree(RUNS / "mae-20270101-000000", RUNS / "mae-20280101-000000")
    shutil.copytree(RUNS / "mae-20260101-000000", RUNS / "mae-copy")
    assert parse_train(["--method", "mae", "--resume"]).out == RUNS / "mae-20260101-000000"
    # A copy that is continued is a run of its own; a run that is continued stays the one that it was.
    for name in ("mae-20260101-000000", "mae-20280101-000000"):
        directory = RunDirectory(RUNS / name, resuming=True)
        directory.write_config(parse_train(["--method", "mae", "--seed", "3"]))
        directory.close()
    assert parse_train(["--method", "mae", "--resume"]).out == RUNS / "mae-20280101-000000"


@pytest.mark.parametrize("method", base.available())
def test_options_survive_a_round_trip_through_plain_values(method):
    for preset in base.find(method).PRESETS.values():
        plain = yaml.safe_load(yaml.safe_dump(to_plain(preset.options)))
        assert from_plain(type(preset.options), plain) == preset.options


def test_a_method_option_is_switched_off_by_flag_and_by_file(tmp_path):
    assert parse_train(["--method", "mae", "--mae.no-norm-pix"]).options.norm_pix is False
    path = tmp_path / "run.yaml"
    path.write_text("method: mae\nmae:\n  norm_pix: false\n")
    assert parse_train(["--config", str(path)]).options.norm_pix is False
