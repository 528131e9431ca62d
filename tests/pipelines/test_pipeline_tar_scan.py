"""What is in a tar file: what tarfile finds, whatever wrote it; damage is told, and no bytes break it."""

import io
import os
import tarfile

import numpy as np
import pytest
from fastmim_pipelines.tar_scan import scan
from tar_files import write_tar


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_what_tarfile_finds(tmp_path, format):
    names = ["a.jpg", "folder/b.png", "x/" * 30 + "c.jpg", "d" * 90 + ".jpg", "folder/" + "e" * 99]
    if format != tarfile.USTAR_FORMAT:
        names += ["long/" * 50 + "f.jpg", "ümläut-名前.jpg", "y" * 300 + ".jpg"]
    path = write_tar(
        tmp_path / "x.tar", [(name, os.urandom(n)) for name, n in zip(names, (0, 1, 511, 512, 513, 5000, 3, 9))], format
    )
    members, reason = scan(str(path))
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert members == expected and len(members) == len(names) and reason == ""


def test_scan_passes_over_all_but_regular_members(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            member = tarfile.TarInfo(f"link-{kind[0]}.jpg")
            member.type, member.linkname, member.size = kind, "/etc/passwd", 700 if kind == tarfile.LNKTYPE else 0
            tar.addfile(member)
        member = tarfile.TarInfo("real.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert [member.name for member in scan(str(path))[0]] == ["real.jpg"]


def test_scan_reads_sizes_in_base_256_and_refuses_impossible_ones(tmp_path):
    data = bytearray(write_tar(tmp_path / "x.tar", [("a.jpg", b"abc")], tarfile.USTAR_FORMAT).read_bytes())

    def with_size(field: bytes) -> tuple:
        changed = bytearray(data)
        changed[124:136] = field
        changed[148:156] = b" " * 8
        changed[148:156] = f"{sum(changed[:512]):06o}\0 ".encode()
        (tmp_path / "y.tar").write_bytes(changed)
        return scan(str(tmp_path / "y.tar"))

    assert with_size(b"\x80" + (3).to_bytes(11, "big"))[0][0].size == 3
    for field in (b"\x80" + (10 << 30).to_bytes(11, "big"), b"77777777777\0"):
        members, reason = with_size(field)
        assert members == [] and reason.startswith("cut short: the member at byte 0 ends at ")
    for field in (b"\xff" * 12, b"\x80" + b"\x7f" * 11):
        assert with_size(field) == ([], "impossible size at byte 0")
    for field in (b"99999999999\0", b"-0000001000\0", b"+0000000003\0", b"0o000000003\0", b"0_000000003\0"):
        assert with_size(field) == ([], "no tar header at byte 0")


@pytest.mark.parametrize(
    "records",
    [b"5 a=b\n", b"999 path=x\n", b"garbage", b"12 size=-12\n", b"30 size=9999999999999999999\n", b"6 a=\n\n"],
)
def test_scan_refuses_broken_extended_headers(tmp_path, records):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("pax")
        member.type, member.size = tarfile.XHDTYPE, len(records)
        tar.addfile(member, io.BytesIO(records))
        member = tarfile.TarInfo("a.jpg")
        tar.addfile(member)
    members, reason = scan(str(path))
    assert (members, reason != "") in (([], True), ([("a.jpg", 1536, 0)], False))


def test_scan_tells_where_an_archive_was_cut(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i + 1]) * 700) for i in range(4)]).read_bytes()
    end = 4 * (512 + 1024)
    for length in [*range(0, end, 97), end - 1, end]:
        (tmp_path / "y.tar").write_bytes(whole[:length])
        members, reason = scan(str(tmp_path / "y.tar"))
        # The padding after the last byte of a member is no part of it.
        assert len(members) == sum(length >= i * 1536 + 512 + 700 for i in range(4)) and reason.startswith("cut short")
    (tmp_path / "y.tar").write_bytes(whole[: end + 512])
    assert scan(str(tmp_path / "y.tar"))[1] == ""
    (tmp_path / "y.tar").write_bytes(whole[:1536] + b"garbage!" * 64 + whole[1536:])
    assert scan(str(tmp_path / "y.tar")) == (scan(str(tmp_path / "x.tar"))[0][:1], "no tar header at byte 1536")


def test_scan_survives_any_bytes(tmp_path):
    rng = np.random.default_rng(0)
    good = write_tar(tmp_path / "x.tar", [("long/" * 40 + f"{i}.jpg", rng.bytes(300)) for i in range(3)]).read_bytes()[
        :8192
    ]
    for trial in range(400):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 4):
            data[place] = int(rng.choice([0, 0x80, 0xFF, int(rng.integers(256))]))
            header = place // 512 * 512
            if trial % 2:  # a sum that is right lets the change through
                data[header + 148 : header + 156] = b" " * 8
                data[header + 148 : header + 156] = f"{sum(data[header : header + 512]):06o}\0 ".encode()
        (tmp_path / "y.tar").write_bytes(data)
        members, reason = scan(str(tmp_path / "y.tar"))
        assert isinstance(reason, str)
        assert all(member.offset >= 0 and member.offset + member.size <= len(data) for member in members)
