"""Which decoder runs, and why the native one cannot: what is built, found and tried."""

import shutil
import subprocess

import pytest
from fastmim_pipelines import native_decode
from fastmim_pipelines.decode import CropReader
from native_decoding import DECODER, needs_native

pytestmark = pytest.mark.usefixtures("unforced")


def test_choose_obeys_the_variable_and_gives_reasons(monkeypatch):
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    assert native_decode.choose() == (None, "Pillow decodes: FASTMIM_DECODE=pillow")
    monkeypatch.setenv("FASTMIM_DECODE", "turbo")
    with pytest.raises(ValueError, match="FASTMIM_DECODE: expected pillow or native, got 'turbo'"):
        native_decode.choose()
    monkeypatch.setattr(native_decode, "load", lambda: (None, "the native decoder is not built; do so"))
    monkeypatch.setenv("FASTMIM_DECODE", "native")
    with pytest.raises(ValueError, match="expected the native decoder, but the native decoder is not built; do so"):
        native_decode.choose()
    monkeypatch.delenv("FASTMIM_DECODE")
    assert native_decode.choose() == (None, "Pillow decodes: the native decoder is not built; do so")
    assert not CropReader([((4, 4), "bicubic")], 3).uses_native


@needs_native
def test_load_tells_what_is_wrong(monkeypatch, tmp_path):
    def reload():
        return native_decode.load.__wrapped__()

    assert reload()[0] is not None
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_libjpegs", lambda: [])
        assert reload() == (None, "no shared libjpeg was found that Pillow uses")
        patch.setattr(native_decode, "_libjpegs", lambda: ["libm.so.6"])
        assert "libm.so.6 cannot be used (it lacks functions of libjpeg-turbo" in reload()[1]
        patch.setattr(native_decode, "_libjpegs", lambda: ["/nonexistent.so"])
        assert "/nonexistent.so cannot be used" in reload()[1]
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_VERSION", -1)
        assert "was built from other sources; build it with" in reload()[1]
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_equals_pillow", lambda decoder: False)
        assert "its pixels differ from those of Pillow" in reload()[1]
    assert native_decode._equals_pillow(DECODER), "a decoder in use changed when another was tried"
    (tmp_path / "_decode.so").write_bytes(b"not a library")
    monkeypatch.setattr("fastmim_pipelines.__path__", [str(tmp_path)])
    assert "cannot be loaded" in reload()[1]
    (tmp_path / "_decode.so").unlink()
    assert "is not built; build it with `python -m fastmim_pipelines.native_decode build`" in reload()[1]


def test_build_needs_sources_and_a_compiler(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_SOURCES", tmp_path)
        with pytest.raises(RuntimeError, match=r"expected sources in .*, got none"):
            native_decode.build()
    if not native_decode._SOURCES.is_dir():
        pytest.skip("no sources here: installed from a wheel")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler, got none"):
        native_decode.build()


def test_libjpeg_interface_is_that_of_the_header(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not native_decode._SOURCES.is_dir():
        pytest.skip("needs a compiler and the sources")
    fields = (
        "src image_width num_components out_color_space scale_denom output_gamma dct_method colormap output_scanline"
    )
    (tmp_path / "check.cpp").write_text(
        f'#include <cstdio>\n#include "{native_decode._SOURCES}/libjpeg_abi.h"\n'
        "#if !__has_include(<jpeglib.h>)\n#error no header\n#endif\n#include <jpeglib.h>\n"
        + "".join(
            f"static_assert(offsetof(jpeg::Decompress, {f}) == offsetof(jpeg_decompress_struct, {f}), {f!r});\n".replace("'", '"')
            for f in fields.split()
        )
        + "static_assert(sizeof(jpeg::Decompress) == sizeof(jpeg_decompress_struct), \"size\");\n"
        "static_assert(sizeof(jpeg::ErrorManager) == sizeof(jpeg_error_mgr), \"error manager\");\n"
        "static_assert(sizeof(jpeg::SourceManager) == sizeof(jpeg_source_mgr), \"source manager\");\n"
        "static_assert(jpeg::kGrayscale == JCS_GRAYSCALE && jpeg::kRgb == JCS_RGB, \"color spaces\");\n"
        "static_assert(jpeg::kLibVersion == JPEG_LIB_VERSION, \"version\");\n"
    )  # fmt: skip
    result = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", tmp_path / "check.cpp"], capture_output=True, text=True
    )
    if "no header" in result.stderr or "version" in result.stderr:
        pytest.skip("no jpeglib.h of version 6.2 here")
    assert result.returncode == 0, result.stderr
