#!/usr/bin/env bash
# Builds FFCV 1.0.2 from its sources and installs it into a Python environment.
#
#   scripts/setup-ffcv.sh [PYTHON]      default: python3
#
# fastmim reads and writes .beton files without FFCV. This is for those who compare the two: the tests of
# tests/pipelines/test_pipeline_beton.py that are skipped without it, and bench/bench_loader.py.
#
# FFCV's sources need OpenCV for one call, cv::resize with INTER_AREA, and libturbojpeg. Where OpenCV's development files
# are missing (some 200 packages), a header written below stands in for them; where libturbojpeg's are, they are taken
# from Debian's packages without installing those. No step needs root.
set -euo pipefail

python=${1:-python3}
version=1.0.2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "setup-ffcv: $1" >&2
  exit 1
}

for tool in g++ pkg-config; do
  command -v "$tool" >/dev/null || fail "expected $tool, got none; sudo apt-get install -y g++ pkg-config"
done
"$python" -c 'import torch' 2>/dev/null || fail "expected an environment with torch, got $python; run make setup and give .venv/bin/python"
[ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
  fail "expected Python.h, got none; sudo apt-get install -y python3-dev"

export PKG_CONFIG_PATH="$work/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
mkdir -p "$work/pkgconfig" "$work/include/opencv2" "$work/wheels"

libraries=""
if ! pkg-config --exists libturbojpeg; then
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    fail "expected libturbojpeg with its pkg-config file, got none; install it (Debian: libturbojpeg0-dev)"
  echo "== libturbojpeg from Debian's packages, not installed"
  (cd "$work" && apt-get -q -o APT::Sandbox::User=root download libturbojpeg0 libturbojpeg0-dev >/dev/null) ||
    fail "expected Debian's packages of libturbojpeg, got none; sudo apt-get install -y libturbojpeg0-dev"
  for package in "$work"/libturbojpeg0*.deb; do dpkg-deb -x "$package" "$work/debian"; done
  libraries=$(dirname "$(find "$work/debian" -name libturbojpeg.so.0)")
  headers=$(dirname "$(find "$work/debian" -name turbojpeg.h)")
  # The development link points to the place of an installed library.
  ln -sf libturbojpeg.so.0 "$libraries/libturbojpeg.so"
  printf 'Name: libturbojpeg\nDescription: unpacked\nVersion: 2\nLibs: -L%s -lturbojpeg\nCflags: -I%s\n' \
    "$libraries" "$headers" > "$work/pkgconfig/libturbojpeg.pc"
fi

if ! pkg-config --exists opencv4; then
  echo "== no OpenCV: a header with the one function that FFCV calls"
  printf 'Name: OpenCV\nDescription: stand-in\nVersion: 4\nLibs: -lm\nCflags: -I%s\n' "$work/include" \
    > "$work/pkgconfig/opencv4.pc"
  cat > "$work/include/opencv2/opencv.hpp" <<'HEADER'
// cv::Mat over foreign memory and cv::resize of 8-bit RGB with INTER_AREA. Shrinking averages source pixels by the area
// that they share with the output pixel, as OpenCV does; enlarging interpolates linearly, where OpenCV differs a little.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define CV_8UC3 16

namespace cv {

enum { INTER_AREA = 3 };

struct Size {
  int width, height;
};

struct Mat {
  int rows, cols;
  long stride;
  uint8_t* data;

  Mat(long height, long width, int, void* pixels)
      : rows(static_cast<int>(height)), cols(static_cast<int>(width)), stride(3 * width), data(static_cast<uint8_t*>(pixels)) {}
  Mat rowRange(long begin, long end) const {
    Mat part = *this;
    part.data += begin * stride;
    part.rows = static_cast<int>(end - begin);
    return part;
  }
  Mat colRange(long begin, long end) const {
    Mat part = *this;
    part.data += begin * 3;
    part.cols = static_cast<int>(end - begin);
    return part;
  }
  Size size() const { return {cols, rows}; }
};

// What each output pixel takes from the source pixels first, first + 1, ...
struct Share {
  int first;
  std::vector<float> weights;
};

inline std::vector<Share> shares(int source, int target) {
  std::vector<Share> result(static_cast<size_t>(target));
  const double ratio = static_cast<double>(source) / target;
  for (int i = 0; i < target; ++i) {
    Share& share = result[static_cast<size_t>(i)];
    if (ratio > 1) {
      const double begin = i * ratio, end = std::min<double>(source, begin + ratio);
      share.first = static_cast<int>(begin);
      for (int k = share.first; k < source && k < end - 1e-9; ++k) {
        share.weights.push_back(static_cast<float>((std::min<double>(end, k + 1) - std::max<double>(begin, k)) / (end - begin)));
      }
    } else {
      const double center = std::clamp((i + 0.5) * ratio - 0.5, 0.0, source - 1.0);
      share.first = static_cast<int>(center);
      const float rest = static_cast<float>(center - share.first);
      share.weights = {1 - rest};
      if (rest > 0) share.weights.push_back(rest);
    }
  }
  return result;
}

inline void resize(const Mat& source, const Mat& target, Size, double, double, int) {
  const std::vector<Share> down = shares(source.rows, target.rows), across = shares(source.cols, target.cols);
  std::vector<float> row(static_cast<size_t>(source.cols) * 3);
  for (int y = 0; y < target.rows; ++y) {
    std::fill(row.begin(), row.end(), 0.f);
    const Share& rows = down[static_cast<size_t>(y)];
    for (size_t k = 0; k < rows.weights.size(); ++k) {
      const uint8_t* from = source.data + (rows.first + static_cast<long>(k)) * source.stride;
      const float weight = rows.weights[k];
      for (size_t i = 0; i < row.size(); ++i) row[i] += weight * from[i];
    }
    uint8_t* out = target.data + y * target.stride;
    for (int x = 0; x < target.cols; ++x, out += 3) {
      const Share& columns = across[static_cast<size_t>(x)];
      const float* from = &row[static_cast<size_t>(columns.first) * 3];
      float red = 0.5f, green = 0.5f, blue = 0.5f;
      for (float weight : columns.weights) {
        red += weight * from[0], green += weight * from[1], blue += weight * from[2];
        from += 3;
      }
      out[0] = static_cast<uint8_t>(red), out[1] = static_cast<uint8_t>(green), out[2] = static_cast<uint8_t>(blue);
    }
  }
}

}  // namespace cv
HEADER
fi

echo "== ffcv $version"
# The unpacked library, if there is one, is put beside the extension.
LDFLAGS='-Wl,-rpath,$ORIGIN/ffcv.libs' "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$work/wheels" "ffcv==$version"
# Not its own dependencies: cupy, pytorch-pfn-extras, fastargs and others are for its GPU transforms and its scripts.
"$python" -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$work"/wheels/ffcv-*.whl
"$python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" numba tqdm psutil opencv-python-headless
if [ -n "$libraries" ]; then
  packages=$("$python" -c 'import importlib.util, os; print(os.path.dirname(os.path.dirname(importlib.util.find_spec("ffcv").origin)))')
  mkdir -p "$packages/ffcv.libs"
  cp "$(readlink -f "$libraries/libturbojpeg.so.0")" "$packages/ffcv.libs/libturbojpeg.so.0"
fi
"$python" -c 'import torch, ffcv.loader' || fail "expected ffcv to import after its installation; see the message above"
echo "== ffcv $version imports; try: $python -m pytest tests/pipelines/test_pipeline_beton.py -rs"
