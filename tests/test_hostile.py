"""What strangers send: bombs, traversal, links, odd pixels. Refused or converted knowingly, by name."""
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pokemon_nb.data import build_dataset, load_rgba, open_dataset, paint_critter, random_critter, unpack


@pytest.fixture
def folder(tmp_path):
    "Sixty critters as a user would keep them."
    (tmp_path / "art").mkdir()
    for k in range(60): paint_critter(random_critter(k), 24).save(tmp_path / f"art/{k:02}.png")
    return tmp_path / "art"


def png(width, height, bits=8, colour=0):
    "A PNG that claims a size; its pixels are zeros, deflated."
    four = lambda n: n.to_bytes(4, "big")
    chunk = lambda kind, data: four(len(data)) + kind + data + four(zlib.crc32(kind + data))
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# pictures

@pytest.mark.slow
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    code = ("import resource, sys; from pokemon_nb.data import load_rgba\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: load_rgba(sys.argv[1])\n"
            "except ValueError as e: print(e)\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb.png"], capture_output=True, text=True)
    said, grown = done.stdout.strip().splitlines()
    assert "bomb.png" in said and "3600000000 pixels" in said and int(grown) < 50          # MiB, not gigabytes
    (tmp_path / "large.png").write_bytes(png(9000, 9000))                                  # Pillow would only warn
    with pytest.raises(ValueError, match=r"large.png.*9000 x 9000 pixels are more than 64 million"):
        load_rgba(tmp_path / "large.png")


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animations_are_refused(tmp_path, kind):
    a, b = (paint_critter(random_critter(k), 24) for k in (1, 2))
    a.save(tmp_path / f"x.{kind}", save_all=True, append_images=[b, a])
    with pytest.raises(ValueError, match=rf"x.{kind}.*3 frames: save the one that is meant"):
        load_rgba(tmp_path / f"x.{kind}")


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    got = np.asarray(load_rgba(tmp_path / "deep.png", matte=False))[..., 0]
    assert np.abs(got - ramp / 257).max() <= .5                       # Pillow's own conversion clips at 255


def test_inks_are_converted_and_a_profile_is_used(tmp_path):
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    inks.save(tmp_path / "plain.jpg")
    assert load_rgba(tmp_path / "plain.jpg", matte=False).getpixel((3, 3))[:3] == (255, 0, 0)
    lab = Image.frombytes("LAB", (4, 4), bytes([128, 60, 0]) * 16)
    lab.save(tmp_path / "lab.tif")
    red, green, blue, alpha = load_rgba(tmp_path / "lab.tif", matte=False).getpixel((0, 0))
    assert red > green and alpha == 255
    broken = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()       # a profile of another kind
    inks.save(tmp_path / "wrong.jpg", icc_profile=broken)
    with pytest.raises(ValueError, match="wrong.jpg"): load_rgba(tmp_path / "wrong.jpg")


def test_a_cameras_turn_is_applied(tmp_path):
    im = Image.new("RGB", (20, 10), "red")
    exif = im.getexif()
    exif[0x0112] = 6
    im.save(tmp_path / "turned.jpg", exif=exif)
    assert load_rgba(tmp_path / "turned.jpg", matte=False).size == (10, 20)


def test_the_build_says_what_it_converts(folder, tmp_path, capsys):
    Image.fromarray(np.full((24, 24), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (24, 24), (0, 200, 0, 0)).save(folder / "inks.jpg")
    build_dataset(folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 of 62 images (CMYK) are converted to 8-bit RGBA" in said
    assert "1 of 62 images (more than 8 bits) are converted" in said


@pytest.mark.parametrize("name, data", [
    ("a.png", b""), ("b.jpg", b"\xff\xd8\xff"), ("c.webp", b"RIFF"), ("d.gif", b"<svg/>"),
    ("e.png", b"\x89PNG\r\n\x1a\n")])
def test_what_is_no_picture_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name): load_rgba(tmp_path / name)


def test_links_out_of_the_folder_and_pipes_are_refused(folder, tmp_path):
    secret = tmp_path / "secret.png"
    paint_critter(random_critter(1), 24).save(secret)
    (folder / "zz.png").symlink_to(secret)
    with pytest.raises(ValueError, match="zz.png must lie inside the folder, but is a link to .*secret.png"):
        build_dataset(folder, tmp_path / "out")
    (folder / "zz.png").unlink()
    (folder / "zz.png").symlink_to("01.png")                           # inside: fine
    build_dataset(folder, tmp_path / "out")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png must be an ordinary file"): build_dataset(folder, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["art", "out", "secret.png"]


# archives

def pack(folder, path, inside=""):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for p in sorted(folder.iterdir()): z.write(p, f"{inside}{p.name}")
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as t:
            for p in sorted(folder.iterdir()): t.add(p, f"{inside}{p.name}")
    return path


@pytest.mark.parametrize("name", ["art.zip", "art.tar", "art.tar.gz", "art.tgz"])
@pytest.mark.parametrize("inside", ["", "my drawings/"])
def test_an_archive_builds_the_same_as_its_folder(folder, tmp_path, name, inside):
    build_dataset(folder, tmp_path / "a")
    build_dataset(pack(folder, tmp_path / name, inside), tmp_path / "b")
    assert open_dataset(tmp_path / "a").hash == open_dataset(tmp_path / "b").hash
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def zipped(path, name, data=b"x", mode=None):
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        if mode: info.external_attr = mode << 16
        z.writestr(info, data)
    return path


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "C:/out.png", "..\\out.png"])
def test_traversal_is_refused_by_name(tmp_path, name):
    (tmp_path / "in").mkdir()
    bad = zipped(tmp_path / "x.zip", name)
    with pytest.raises(ValueError, match="must stay inside its folder"): unpack(bad, tmp_path / "in")
    with tarfile.open(tmp_path / "x.tar", "w") as t:
        info = tarfile.TarInfo(name)
        info.size = 1
        t.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="must stay inside its folder"): unpack(tmp_path / "x.tar", tmp_path / "in")
    assert not list((tmp_path / "in").rglob("*.png")) and not (tmp_path / "out.png").exists()


def test_links_devices_twins_and_passwords_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    link = zipped(tmp_path / "link.zip", "a.png", b"/etc/passwd", stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match="got the link 'a.png'"): unpack(link, tmp_path / "in")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "x.tar", "w") as t:
            info = tarfile.TarInfo("b.png")
            info.type, info.linkname = kind, "/etc/passwd"
            t.addfile(info)
        with pytest.raises(ValueError, match="link or device 'b.png'"): unpack(tmp_path / "x.tar", tmp_path / "in")
    twins = zipped(zipped(tmp_path / "t.zip", "A.png"), "a.PNG")
    with pytest.raises(ValueError, match="upper and lower case alike"): unpack(twins, tmp_path / "in")
    locked = zipped(tmp_path / "locked.zip", "a.png")
    data = bytearray(locked.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.index(mark) + at] |= 1
    locked.write_bytes(data)
    with pytest.raises(ValueError, match="must not be encrypted, got 'a.png'"): unpack(locked, tmp_path / "in")


@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False])
def test_a_zip_bomb_is_refused_early(tmp_path, honest):
    bomb = tmp_path / "bomb.zip"
    zipped(bomb, "zeros.png", bytes(200 << 20))
    if not honest:                                                     # it claims one byte
        data = bytearray(bomb.read_bytes())
        at = data.index(b"PK\x01\x02") + 24
        data[at:at + 4] = (1).to_bytes(4, "little")
        bomb.write_bytes(data)
    code = ("import resource, sys; from pathlib import Path; from pokemon_nb.data import unpack\n"
            "try: unpack(sys.argv[1], sys.argv[2])\n"
            "except ValueError as e: print(e)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)")
    (tmp_path / "in").mkdir()
    idle = "import resource, pokemon_nb.data; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)"
    base = subprocess.run([sys.executable, "-c", idle], capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code, bomb, tmp_path / "in"], capture_output=True, text=True)
    said, peak = done.stdout.strip().splitlines()
    assert "bomb.zip" in said and ("archive bomb" in said or "whole archive" in said)
    assert int(peak) < int(base.stdout) + 60
    assert sum(p.stat().st_size for p in (tmp_path / "in").rglob("*") if p.is_file()) <= 64 << 20


def test_a_damaged_archive_and_a_wrong_file_are_named(folder, tmp_path):
    whole = pack(folder, tmp_path / "art.tar.gz")
    (tmp_path / "half.tar.gz").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="half.tar.gz must be a whole archive"):
        build_dataset(tmp_path / "half.tar.gz", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"notes.txt', which is no archive \(.zip"):
        build_dataset(tmp_path / "notes.txt", tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.name == "out"]


def test_a_bomb_in_an_archive_leaves_nothing(folder, tmp_path):
    (folder / "bomb.png").write_bytes(png(30_000, 30_000))
    with pytest.raises(ValueError, match=r"bomb.png.*900000000 pixels"):
        build_dataset(pack(folder, tmp_path / "art.zip"), tmp_path / "out")
    assert sorted(Path(p).name for p in tmp_path.iterdir()) == ["art", "art.zip"]
