"""Guards of the door: pictures, folders and archives from strangers. Every hostile file is made here."""
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pokemon_nb import data
from pokemon_nb.data import (
    MAX_PIXELS, build_dataset, dataset_hash, decode_rgba, load_rgba, open_dataset, paint_critter, random_critter,
    read_metadata,
)


# --- makers ---------------------------------------------------------------------------------------------------------
def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels, colour, depth=16, size=None, extra=b""):
    "A PNG of any depth, written by the specification; `size` may lie about (width, height)."
    pixels = np.asarray(pixels)
    h, w = pixels.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", *(size or (w, h)), depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(lines))
            + chunk(b"IEND", b""))


def cmyk_profile():
    "An ICC profile of a strange press: paper is white, its magenta ink prints a dark green, everything else black."
    lab = {(0, 0, 0, 0): (255, 128, 128), (0, 1, 0, 0): (110, 78, 168)}
    nodes = [lab.get((c, m, y, k), (0, 128, 128)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    ramp, one = bytes(range(256)), 1 << 16
    table = (b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, one)
             + ramp*4 + bytes(v for n in nodes for v in n) + ramp*3)
    table += bytes(-len(table) % 4)
    size = 128 + 4 + 12 + len(table)
    head = (struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
            + bytes(28) + struct.pack(">3i", round(.9642*one), one, round(.8249*one)) + bytes(48))
    return head + struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(table)) + table


def saved(im, kind, **options):
    file = io.BytesIO()
    im.save(file, kind, **options)
    return file.getvalue()


def flat(mode="RGB", colour=(200, 100, 50), size=(8, 8)): return Image.new(mode, size, colour)


def pixel(content): return decode_rgba(content, "it", matte=False).getpixel((0, 0))


def zoo(folder, n=40):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n): paint_critter(random_critter(k), 16).save(folder/f"{k}.png")
    return folder


# --- pictures that are converted ------------------------------------------------------------------------------------
@pytest.mark.parametrize("colour,values,want", [
    (0, [40000], (156, 156, 156, 255)), (4, [40000, 257*7], (156, 156, 156, 7)),
    (2, [65535, 257*9, 40000], (255, 9, 156, 255)), (6, [65535, 0, 40000, 257*100], (255, 0, 156, 100)),
])
def test_16_bit_pngs_are_scaled_not_clipped(colour, values, want):
    grid = np.broadcast_to(np.array(values), (4, 4, len(values)))
    assert pixel(png(grid, colour)) == want


def test_the_transparent_colour_of_a_16_bit_png_is_kept():
    gray = np.full((4, 4, 1), 40000)
    gray[0] = 40001                                               # differs in the lower byte only
    im = decode_rgba(png(gray, 0, extra=chunk(b"tRNS", struct.pack(">H", 40000))), "it", matte=False)
    assert im.getpixel((0, 0))[3] == 255 and im.getpixel((0, 3)) == (156, 156, 156, 0)
    rgb = np.broadcast_to(np.array([40000, 0, 65535]), (4, 4, 3))
    assert pixel(png(rgb, 2, extra=chunk(b"tRNS", struct.pack(">HHH", 40000, 0, 65535))))[3] == 0


def test_palette_gray_and_bilevel_with_transparency():
    im = flat("P", 1)
    im.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(saved(im, "PNG", transparency=bytes([255, 99]))) == (10, 20, 30, 99)
    assert pixel(saved(flat("LA", (77, 5)), "PNG")) == (77, 77, 77, 5)
    assert pixel(saved(flat("L", 77), "PNG", transparency=77))[3] == 0
    assert pixel(saved(flat("1", 1), "PNG")) == (255, 255, 255, 255)


def test_cmyk_without_a_profile_is_converted_plainly():
    r, g, b, a = pixel(saved(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100))
    assert r > 250 and g < 5 and b < 5 and a == 255
    r, g, b, _ = pixel(saved(flat("CMYK", (255, 0, 0, 128)), "TIFF"))
    assert (r, g, b) == (0, 127, 127)


def test_cmyk_goes_through_its_profile():
    ink = flat("CMYK", (0, 255, 0, 0))
    for kind in ("JPEG", "TIFF"):
        r, g, b, _ = pixel(saved(ink, kind, icc_profile=cmyk_profile()))
        assert g > 90 > 60 > r and g > b + 40, (kind, r, g, b)   # the strange press; plainly it would be (255,0,255)
    note = data._decode(io.BytesIO(saved(ink, "TIFF", icc_profile=b"no profile at all")), "x", "y", 99)[1]
    assert note == "CMYK with an unusable profile"


def test_lab_is_converted_by_its_definition():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    im = ImageCms.profileToProfile(flat(), srgb, lab, outputMode="LAB")
    assert np.abs(np.subtract(pixel(saved(im, "TIFF"))[:3], (200, 100, 50))).max() <= 4


@pytest.mark.parametrize("flag", range(1, 9))
def test_a_cameras_rotation_is_applied(flag):
    upright = Image.new("RGB", (32, 16), "blue")
    upright.paste("red", (0, 0, 16, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}             # Image.Transpose that makes what the camera stored
    stored = upright if flag == 1 else upright.transpose(Image.Transpose(undo[flag]))
    exif = Image.Exif()
    exif[0x0112] = flag
    im, note = data._decode(io.BytesIO(saved(stored, "PNG", exif=exif)), "x", "y", 9999)
    assert np.array_equal(np.asarray(im.convert("RGB")), np.asarray(upright))
    assert (note == "rotated by its EXIF flag") == (flag != 1)


def test_a_phone_jpeg_with_a_preview_behind_it_is_one_picture():
    content = saved(flat(), "MPO", save_all=True, append_images=[flat(colour=(0, 0, 0))])
    assert Image.open(io.BytesIO(content)).n_frames == 2 and pixel(content)[0] > 150


# --- pictures that are refused --------------------------------------------------------------------------------------
def animation(kind): return saved(flat(), kind, save_all=True, append_images=[flat(colour=(0, 0, 9))])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_with_advice(kind):
    with pytest.raises(ValueError, match=r"'dance'.*several frames or pages; save the one you want as a PNG"):
        decode_rgba(animation(kind), "dance")
    assert pixel(saved(flat(), kind))[3] == 255                   # one frame of the same kind is taken


@pytest.mark.parametrize("side", [9000, 14000, 60000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side, tmp_path):
    "The file has one line of pixels; decoding would fail otherwise, or allocate `side` squared."
    (tmp_path/"huge.png").write_bytes(png(np.zeros((1, 1, 1)), 0, 8, size=(side, side)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                           # Pillow warns from 89 megapixels on
        with pytest.raises(ValueError, match=r"huge\.png.*limit of 64 megapixels"): load_rgba(tmp_path/"huge.png")
    assert side*side > MAX_PIXELS


@pytest.mark.parametrize("kind,head", [("zTXt", b"k\0\0"), ("iCCP", b"k\0\0"), ("iTXt", b"k\0\1\0\0\0")])
def test_a_bomb_beside_the_pixels_is_refused(kind, head):
    "100 MiB of text or colour profile in 100 kB of an otherwise good picture."
    content = png(np.full((4, 4, 3), 9), 2, 8, extra=chunk(kind.encode(), head + zlib.compress(bytes(100*2**20))))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="'it': Decompressed data too large"): decode_rgba(content, "it")
        assert tracemalloc.get_traced_memory()[1] < 20*2**20
    finally: tracemalloc.stop()


def test_pixels_beyond_the_last_row_are_not_unpacked():
    "8 x 8 pixels by the header, and 100 MiB of pixel data: the picture is what the header says."
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100*2**20))) + chunk(b"IEND", b"")
    tracemalloc.start()
    try:
        assert decode_rgba(content, "it", matte=False).size == (8, 8)
        assert tracemalloc.get_traced_memory()[1] < 20*2**20
    finally: tracemalloc.stop()


def test_the_limit_is_exact_and_can_be_moved():
    content = saved(flat(size=(10, 10)), "PNG")
    assert decode_rgba(content, "it", max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10 x 10 pixels"): decode_rgba(content, "it", max_pixels=99)


@pytest.mark.parametrize("content,why", [
    (b"", "none of PNG"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG, JPEG"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG"), (png(np.zeros((1, 1, 1)), 0, 8, size=(0, 5)), "it"),
    (png(np.arange(99).reshape(9, 11, 1), 0)[:-30], "download it again"),
    (saved(flat(), "JPEG")[:200], "download it again"),
    (saved(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"), "defined white"),
    (saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), "defined white"),
    (saved(flat(), "ICO"), "none of PNG"),
], ids="empty postscript svg no-height cut-png cut-jpeg int32 nan ico".split())
def test_what_is_no_whole_picture_is_refused_by_name(content, why):
    with pytest.raises(ValueError, match=why) as e: decode_rgba(content, "it.png")
    assert "'it.png'" in str(e.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", data._FORMATS)
def test_damaged_files_end_in_a_picture_or_a_refusal(kind):
    "200 files with random bytes changed: no other exception comes out."
    rng, whole, refused = random.Random(kind), saved(paint_critter(random_critter(1), 24).convert("RGB"), kind), 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 4, 30))): content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < .3: del content[rng.randrange(len(content)):]
        try: assert decode_rgba(bytes(content), "it").mode == "RGBA"
        except ValueError as e:
            refused += 1
            assert "'it'" in str(e)
    assert 20 < refused <= 200


# --- folders --------------------------------------------------------------------------------------------------------
def refused(source, tmp_path, match):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=match) as e: build_dataset(source, tmp_path/"data")
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "a failure leaves nothing"
    assert ".unpacked" not in str(e.value), "the error names the source, not a folder that is gone"


def pipe(f): os.mkfifo(f)


def bind(f):
    here = os.getcwd()
    os.chdir(f.parent)                                            # the path of a socket is short
    try: socket.socket(socket.AF_UNIX).bind(f.name)
    finally: os.chdir(here)


@pytest.mark.parametrize("name,make,why", [
    ("x.png", lambda f: f.symlink_to("/etc/hosts"), "x.png: a link out of the folder, to /etc/hosts"),
    ("x.png", lambda f: f.symlink_to("nowhere"), "x.png: a link that leads nowhere"),
    ("x.png", lambda f: f.symlink_to(f), "x.png: a link that leads nowhere"),
    ("sub", lambda f: f.symlink_to(f.parent.parent.parent), "sub: a link out of the folder"),
    ("sub", lambda f: f.symlink_to(f.parent), "sub: a link that goes round in a circle"),
    ("metadata.jsonl", lambda f: f.symlink_to("/etc/hosts"), "metadata.jsonl: a link out"),
    ("x.png", pipe, "x.png: must be a file or a folder, got a pipe"),
    ("metadata.jsonl", pipe, "metadata.jsonl: must be a file"),
    ("x.png", bind, "x.png: must be a file or a folder"), ("x.png", Path.mkdir, "x.png: a folder with the name"),
    ("logo.svg", Path.touch, r"logo.svg: a picture of a kind not read; allowed: \.png"),
    ("photo.HEIC", Path.touch, "photo.HEIC: a picture of a kind not read"),
    ("zero.png", Path.touch, "zero.png.*none of PNG"),
    ("dance.png", lambda f: f.write_bytes(animation("PNG")), "dance.png.*several frames"),
])
def test_a_hostile_folder_is_refused_by_name(tmp_path, name, make, why):
    make(zoo(tmp_path/"zoo"/"in")/name)
    refused(tmp_path/"zoo", tmp_path, why)


def test_links_inside_are_followed(tmp_path):
    zoo(tmp_path/"zoo"/"a")
    (tmp_path/"zoo"/"one.png").symlink_to("a/1.png")
    (tmp_path/"zoo"/"b").symlink_to("a")
    (tmp_path/"alias").symlink_to("zoo")                          # the source itself may be a link
    out = build_dataset(tmp_path/"alias", tmp_path/"data")
    names = {r["file_name"] for s in data.SPLITS for r in read_metadata(out, s)}
    assert len(names) == 81 and {"one.png", "a/1.png", "b/1.png"} <= names
    assert not any(p.is_symlink() for p in out.rglob("*"))


def test_conversions_are_said_once_and_recorded(tmp_path, capsys):
    folder = zoo(tmp_path/"zoo")
    for k in range(3): (folder/f"ink{k}.jpg").write_bytes(saved(flat("CMYK", (0, 99, 99, 0)), "JPEG"))
    (folder/"deep.png").write_bytes(png(np.full((4, 4, 1), 9999), 0))
    out = build_dataset(folder, tmp_path/"data")
    said = capsys.readouterr().out
    assert said.count("3 of 44 images were CMYK without a profile: converted") == 1
    assert said.count("1 of 44 images were 16-bit: converted") == 1
    assert '"CMYK without a profile": 3' in (out/"dataset.json").read_text()


# --- archives -------------------------------------------------------------------------------------------------------
def zipped(path, entries):
    "A zip with `entries`: (name or ZipInfo, bytes)."
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        warnings.simplefilter("ignore")                           # of duplicate names
        for name, content in entries: z.writestr(name, content)
    return path


def tarred(path, entries, mode="w"):
    "A tar with `entries`: (TarInfo, bytes)."
    with tarfile.open(path, mode) as t:
        for info, content in entries:
            if isinstance(info, str): info = tarfile.TarInfo(info)
            if content is not None: info.size = len(content)
            t.addfile(info, io.BytesIO(content or b""))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind,suffix", [("zip", ".zip"), ("tar", ".tar"), ("gztar", ".tar.gz"), ("bztar", ".tar.bz2"),
                                         ("xztar", ".tar.xz")])
@pytest.mark.parametrize("top", [True, False])
def test_an_archive_builds_what_its_folder_builds(tmp_path, kind, suffix, top):
    folder = zoo(tmp_path/"zoo"/"mine", 30)
    zoo(folder/"more", 5)
    (folder/".DS_Store").write_bytes(b"hidden"); (folder/"notes.txt").write_text("not a picture")
    at = dict(root_dir=tmp_path/"zoo", base_dir="mine") if top else dict(root_dir=folder)
    packed = Path(shutil.make_archive(str(tmp_path/"art"), kind, **at))
    assert packed.name == f"art{suffix}"
    a, b = build_dataset(folder, tmp_path/"a"), build_dataset(packed, tmp_path/"b")
    assert dataset_hash(a) == dataset_hash(b) and open_dataset(b).source == "folder"
    assert sorted(p.name for p in b.iterdir()) == ["dataset.json", "test", "train", "val"]


def test_splits_at_the_top_of_an_archive_stay_splits(tmp_path):
    for s in data.SPLITS: zoo(tmp_path/"zoo"/s, 2)
    for s, k in (("val", 5), ("test", 9)):                        # a family in one split only
        for p in (tmp_path/"zoo"/s).iterdir(): p.rename(p.with_name(f"{k}{p.name}"))
    out = build_dataset(shutil.make_archive(str(tmp_path/"art"), "zip", tmp_path/"zoo"), tmp_path/"data")
    assert open_dataset(out).counts == dict(train=2, val=2, test=2)


PNG = saved(flat(), "PNG")


def mode_of(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize("entries,why", [
    ([("/tmp/x.png", PNG)], "'/tmp/x.png' is an absolute path"), ([("C:/x.png", PNG)], "absolute path"),
    ([("../../x.png", PNG)], "'../../x.png' leads out"), ([("a/../../x.png", PNG)], "leads out"),
    ([("a\\..\\x.png", PNG)], "backslash"), ([("a\nb.png", PNG)], "can not be printed"),
    ([("a.png", PNG), ("a.png", PNG)], "'a.png' comes twice"),
    ([("a.png", PNG), ("A.png", PNG)], "'A.png' and 'a.png' differ in case only"),
    ([("d/a.png", PNG), ("D/b.png", PNG)], "'D' and 'd' differ in case only"),
    ([("caf\u00e9.png", PNG), ("cafe\u0301.png", PNG)], "differ in case only"),      # two spellings of one name
    ([("x"*300 + ".png", PNG)], "a name of 304 characters"), ([("a/"*600 + "x.png", PNG)], "a name of 1205"),
    ([("a/"*120 + "x.png", PNG)], "more than 100 folders deep"),
    ([("a.png", PNG), ("a.png/b.png", PNG)], "twice"), ([("a/b.png", PNG), ("a", PNG)], "twice"),
    ([(mode_of("l.png", 0o120777), b"/etc/passwd")], "'l.png' is a link or a device"),
    ([(mode_of("p.png", 0o010644), b"")], "'p.png' is a link or a device"),
    ([("in.zip", b"PK")], "'in.zip' is an archive in the archive"), ([("in.tar.gz", b"")], "archive in the archive"),
    ([("notes.txt", b"x")], "must hold pictures, got none in .*art.zip"),
    ([("a.svg", b"<svg/>")], r"art.zip/a.svg: a picture of a kind not read"),
])
def test_a_hostile_zip_is_refused_by_name(tmp_path, entries, why):
    refused(zipped(tmp_path/"art.zip", entries), tmp_path, why)


@pytest.mark.parametrize("entries,why", [
    ([("/tmp/x.png", PNG)], "'/tmp/x.png' is an absolute path"), ([("../x.png", PNG)], "'../x.png' leads out"),
    ([(special("l.png", tarfile.SYMTYPE, "/etc/passwd"), None)], "'l.png' is a link"),
    ([("a.png", PNG), (special("l.png", tarfile.LNKTYPE, "a.png"), None)], "'l.png' is a link"),
    ([(special("dir", tarfile.SYMTYPE, ".."), None), ("dir/x.png", PNG)], "'dir' is a link"),
    ([(special("p.png", tarfile.FIFOTYPE), None)], "'p.png' is a device, pipe"),
    ([(special("d.png", tarfile.CHRTYPE), None)], "'d.png' is a device"),
    ([("a.png", PNG), ("A.PNG", PNG)], "differ in case only"), ([("a.png", PNG)]*2, "'a.png' comes twice"),
])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_hostile_tar_is_refused_by_name(tmp_path, entries, why, suffix):
    refused(tarred(tmp_path/f"art.tar{suffix}", entries, "w:gz" if suffix else "w"), tmp_path, why)


def test_sparse_tar_entries_are_refused(tmp_path):
    "A hole of 1 TB takes no bytes in the archive."
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1",
                        "GNU.sparse.size": str(10**12), "GNU.sparse.numblocks": "1"}
    refused(tarred(tmp_path/"art.tar", [(info, b"x")]), tmp_path, "'x.png' is a device, pipe or sparse")


def test_encrypted_and_rare_entries_are_refused(tmp_path):
    packed = zipped(tmp_path/"art.zip", [("a.png", PNG)])
    raw = bytearray(packed.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)): raw[raw.index(mark) + offset] |= 1
    packed.write_bytes(raw)
    refused(packed, tmp_path, "'a.png' is encrypted")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_BZIP2) as z: z.writestr("a.png", PNG)
    refused(packed, tmp_path, "rare compression")


@pytest.mark.parametrize("name,content", [("a.zip", b"not an archive"), ("a.zip", b""), ("a.tar", b"x"*2000),
                                          ("a.tar.gz", b"\x1f\x8bnothing")])
def test_no_archive_at_all(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    refused(tmp_path/name, tmp_path, f"{name}: must be a whole archive")


@pytest.mark.parametrize("kind,suffix", [("zip", ".zip"), ("gztar", ".tar.gz"), ("xztar", ".tar.xz")])
def test_a_cut_or_damaged_archive_is_refused(tmp_path, kind, suffix):
    packed = Path(shutil.make_archive(str(tmp_path/"art"), kind, zoo(tmp_path/"zoo")))
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-len(whole)//3])
    refused(packed, tmp_path, "must be a whole archive|must be a whole picture")
    bad = bytearray(whole)
    bad[len(bad)//2] ^= 255
    packed.write_bytes(bad)
    refused(packed, tmp_path, "must be a whole archive|must be a whole picture")


def test_a_file_that_is_no_archive_by_name(tmp_path):
    (tmp_path/"art.rar").write_bytes(b"Rar!")
    refused(tmp_path/"art.rar", tmp_path, r"archive, got the file '.*art.rar'; allowed: \.zip, \.tar")


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_MEMBERS", 5)
    refused(zipped(tmp_path/"art.zip", [(f"{k}.png", PNG) for k in range(6)]), tmp_path, "more than 5 entries")


def bomb(path, size):
    "An archive from which `size` zeros come: a picture, or (pax) the header of one."
    zeros = io.BytesIO(bytes(size))
    if path.suffix == ".zip": return zipped(path, [("x.png", zeros.getvalue())])
    info = tarfile.TarInfo("x.png")
    info.size = size
    if "pax" in path.name: info.type = tarfile.XHDTYPE
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w:xz") as t: t.addfile(info, zeros)
    return path


BOMBS = ["art.zip", "art.tar.gz", "art.tar.xz", "pax.tar.gz"]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_early(tmp_path, name):
    "256 MiB from some 256 kB: no more than 25 MiB ever come out, and little of it is in memory at a time."
    packed = bomb(tmp_path/name, 2**28)
    assert 2**28/packed.stat().st_size > 900
    tracemalloc.start()
    try:
        refused(packed, tmp_path, "a bomb: more than [12][0-9] MiB come out of")
        assert tracemalloc.get_traced_memory()[1] < 40*2**20
    finally: tracemalloc.stop()


CHILD = """
import resource, sys
from pokemon_nb.data import build_dataset, random_critter, paint_critter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
paint_critter(random_critter(0), 64)
for source in sys.argv[2:]:
    before = peak()
    try: build_dataset(source, sys.argv[1])
    except ValueError as e: print(f"{peak() - before:.0f} {e}")
"""


@pytest.mark.slow
def test_a_bomb_does_not_grow_the_process(tmp_path):
    "What the system says, decompressors included: less than 40 MiB for each."
    packed = [str(bomb(tmp_path/n, 2**28)) for n in BOMBS]
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path/"data"), *packed], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 4 and all("a bomb: more than" in s and int(s.split()[0]) < 40 for s in said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(BOMBS)


def test_declared_sizes_prove_nothing(tmp_path):
    "A zip whose tables say 10 bytes is read by what comes out, and refused as damaged."
    packed = zipped(tmp_path/"art.zip", [("x.png", bytes(2**20))])
    raw = packed.read_bytes().replace(struct.pack("<I", 2**20), struct.pack("<I", 10))
    packed.write_bytes(raw)
    refused(packed, tmp_path, "must be a whole archive|must be a whole picture")


def test_small_archives_may_compress_well(tmp_path):
    "Flat BMPs are honest and pack 500:1; the ratio counts from 16 MiB on."
    folder = tmp_path/"zoo"
    folder.mkdir()
    for k in range(40): Image.new("RGB", (200, 200), (k, 9, 9)).save(folder/f"{k}.bmp")
    packed = Path(shutil.make_archive(str(tmp_path/"art"), "gztar", folder))
    assert 4.8e6/packed.stat().st_size > data.MAX_RATIO
    assert open_dataset(build_dataset(packed, tmp_path/"data")).counts["train"] > 20


@pytest.mark.slow
def test_a_killed_unpacking_leaves_no_dataset_and_the_next_build_sweeps(tmp_path):
    packed = Path(shutil.make_archive(str(tmp_path/"art"), "xztar", zoo(tmp_path/"zoo", 300)))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/"data"), str(packed)],
                             env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent.parent)})
    end = time.time() + 60
    while not (left := list(tmp_path.glob(".data.building-*/.unpacked"))) and time.time() < end: time.sleep(.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert left and not (tmp_path/"data").exists()
    for p in tmp_path.glob(".data.building-*"): os.utime(p, (0, 0))
    out = build_dataset(packed, tmp_path/"data")
    assert dataset_hash(out) == dataset_hash(build_dataset(tmp_path/"zoo", tmp_path/"other"))
    assert not list(tmp_path.glob(".data.*"))
