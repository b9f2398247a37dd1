"""Damaged and hostile files that are named like images: 40 kinds, as many of each as asked for, the same for a seed."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

SIDE = 30_000  # pixels; what headers claim
READ, REFUSED, EITHER = "read", "refused", "either"  # what must become of a file; EITHER: as the damage happens to be


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width: int, height: int, depth: int, color: int, rest: bytes = b"", idat: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, int, int]], rest: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: {tag: (type, count, value)}."""
    entries = b"".join(struct.pack("<HHII", tag, *values) for tag, values in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + rest


def huge_tiff(side: int, samples: int, compression: int) -> bytes:
    numbers = {256: side, 257: side, 258: 8, 259: compression, 262: 2 if samples > 1 else 1, 273: 200, 277: samples}
    numbers |= {278: side, 279: 64}
    return tiff({tag: (4, 1, value) for tag, value in numbers.items()}, bytes(200))


def huge_gif(side: int) -> bytes:
    """Valid: one frame of one pixel on a large screen."""
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def huge_webp(side: int) -> bytes:
    """An extended header with the largest canvas, 16383 x 16383, before a small image."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(buffer, "WEBP", lossless=True)
    body = buffer.getvalue()[12:]
    size = struct.pack("<I", min(side, 16383) - 1)[:3]
    frame = bytes(6) + struct.pack("<I", 7)[:3] * 2 + bytes(4) + body
    anim = b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    riff = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + size * 2 + anim
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def huge_headers(side: int) -> dict[str, bytes]:
    """{extension: a header of that format that claims side x side pixels}, with a few bytes behind it."""
    bmp = b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    jpeg = bytearray(jpeg.getvalue())
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", side, side)
    jp2 = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jp2, "JPEG2000", no_jp2=True)
    jp2 = bytearray(jp2.getvalue())
    jp2[8:16] = struct.pack(">II", side, side)  # SIZ: the image's extent
    return {
        "bmp": bmp + bytes(64),
        "jpg": bytes(jpeg),
        "ppm": b"P6 %d %d 255\n" % (side, side) + bytes(64),
        "pgm": b"P5 %d %d 65535\n" % (side, side) + bytes(64),
        "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, side, side, 32, 0) + bytes(64),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, side, side, 8, 3) + bytes(64),
        "sgi": struct.pack(">HBBHHHH", 474, 0, 1, 3, side, side, 3) + bytes(600),
        "j2k": bytes(jp2),
        "qoi": b"qoif" + struct.pack(">IIBB", side, side, 4, 0) + bytes(64),
    }


def encoded(rng: np.random.Generator, kind: str, side: int = 64, **options) -> bytes:
    """A valid file of noise that compresses somewhat, as an image does."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 64, (side, side, 3), dtype=np.uint8) * 4).save(buffer, kind, **options)
    return buffer.getvalue()


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    """Without its last part: somewhere behind the first 10 bytes, and before the last sixth."""
    return data[: int(rng.integers(10, len(data) * 5 // 6))]


def flipped(rng: np.random.Generator, data: bytes, first: int = 8, last: int | None = None) -> bytes:
    """With 1 to 6 flipped bits."""
    damaged = bytearray(data)
    for place in rng.integers(first, last or len(data), int(rng.integers(1, 7))):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def zeros(mib: int) -> bytes:
    """So many MiB of zeros, compressed by zlib to a thousandth, made without compressing them all."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # can follow itself, but for its 2 bytes
    end = zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    return first + first[2:] * (mib - 1) + end + struct.pack(">HH", (mib << 20) % 65521, 1)  # Adler-32


def text_chunk(i: int) -> bytes:
    """1.5 to 5 GiB of zeros, compressed, where PNG has texts and color profiles."""
    bomb, kind = zeros(1536 + 512 * (i % 8)), i % 3
    head = (b"Comment\0\1\0\0\0", b"Comment\0\0", b"icc\0\0")[kind]
    return chunk((b"iTXt", b"zTXt", b"iCCP")[kind], head + bomb)


LOSSY = {"JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "JPEG2000": "jp2", "PPM": "ppm"}
PIXELS = zlib.compress(bytes(3 * 65))  # of an image that is black


def contents(kind: str, i: int, rng: np.random.Generator) -> tuple[bytes, str, str] | None:
    """(bytes, extension, what must become of it) of instance i of a kind that is a file; None of another kind."""
    other, extension = [*LOSSY.items()][i % len(LOSSY)]
    grey = rng.integers(0, 256, (40, 40), dtype=np.uint8)
    match kind:
        case "cut png":
            return cut(rng, encoded(rng, "PNG")), "png", REFUSED
        case "cut jpeg":
            return cut(rng, encoded(rng, "JPEG")), "jpg", REFUSED
        case "cut tiff":
            return cut(rng, encoded(rng, "TIFF", compression=("tiff_lzw", "tiff_adobe_deflate")[i % 2])), "tif", EITHER
        case "cut other":
            return cut(rng, encoded(rng, other)), extension, EITHER
        case "cut interlaced png":
            interlaced = bytearray(encoded(rng, "PNG"))
            interlaced[28] = 1
            interlaced[29:33] = struct.pack(">I", zlib.crc32(bytes(interlaced[12:29])))
            return cut(rng, bytes(interlaced)), "png", REFUSED
        case "cut progressive jpeg":
            return cut(rng, encoded(rng, "JPEG", progressive=True)), "jpg", REFUSED
        case "flipped png":
            return flipped(rng, encoded(rng, "PNG")), "png", EITHER
        case "flipped jpeg":
            return flipped(rng, encoded(rng, "JPEG")), "jpg", EITHER
        case "flipped header":
            return flipped(rng, encoded(rng, other), 0, 40), extension, EITHER
        case "flipped other":
            return flipped(rng, encoded(rng, other)), extension, EITHER
        case "flipped tiff directory":
            data = encoded(rng, "TIFF")
            start = struct.unpack("<I", data[4:8])[0]
            return flipped(rng, data, start, min(start + 120, len(data))), "tif", EITHER
        case "wrong extension":
            return encoded(rng, other), "png" if other != "PPM" else "jpg", READ
        case "few bytes":
            return b"\x89PNG\r\n\x1a\n"[:i], "png", REFUSED
        case "text":
            texts = (b"not an image\n", b"<!DOCTYPE html><html>404</html>", b'{"a": 1}', rng.bytes(2000))
            return texts[i % 4] * (1 + i), ("png", "jpg", "tif", "bmp")[i % 4], REFUSED
        case "postscript":
            return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" + b"\n" * i, "png", REFUSED
        case "huge png":
            depth, color = ((8, 6), (8, 2), (16, 0), (16, 6), (8, 3), (16, 2), (8, 4), (8, 0))[i % 8]
            side = (SIDE, 2**31 - 1, 46_000, 100_000)[i // 2 % 4] if i else SIDE
            return png(side, side, depth, color)[: 74 if i % 2 else None], "png", REFUSED
        case "huge gif":
            return huge_gif(SIDE + 2000 * i), "gif", REFUSED
        case "huge webp":
            return huge_webp(16383), "webp", REFUSED
        case "huge tiff":
            return huge_tiff(SIDE + i, (1, 3, 4)[i % 3], (1, 5, 8)[i // 2 % 3]), "tif", REFUSED
        case "huge header":
            name, data = [*huge_headers(SIDE).items()][i % 9]
            return data, name, REFUSED
        case "long and thin":  # valid: resizing one side first would take 224 times as much
            mib = 2 + i
            return png(1, (mib << 20) // 5, 8, 6, idat=zeros(mib)), "png", EITHER  # rows of a filter's byte and RGBA
        case "text bomb":
            return png(64, 1, 8, 2, text_chunk(i), PIXELS), "png", EITHER
        case "pixel bomb":  # gigabytes behind the pixels
            return png(64, 1, 8, 2, idat=zeros(1024 * (1 + i))), "png", EITHER
        case "wrong checksum":
            data = bytearray(encoded(rng, "PNG"))
            data[29 if i % 2 else -5] ^= 1 + i
            return bytes(data), "png", REFUSED if i % 2 else EITHER
        case "bad color profile":
            return encoded(rng, ("PNG", "JPEG")[i % 2], icc_profile=rng.bytes(200)), ("png", "jpg")[i % 2], READ
        case "bad exif":
            exif = b"Exif\0\0" + (b"II*\0", b"MM\0*")[i % 2] + rng.bytes(6 * i)
            return encoded(rng, ("JPEG", "PNG", "WEBP")[i % 3], exif=exif), ("jpg", "png", "webp")[i % 3], READ
        case "many frames":
            buffer = io.BytesIO()
            frames = [Image.fromarray(np.roll(grey, k)) for k in range(4)]
            frames[0].save(buffer, ("GIF", "TIFF")[i % 2], save_all=True, append_images=frames[1:])
            data = buffer.getvalue()
            return data[: len(data) - 200 * (i // 4)], ("gif", "tif")[i % 2], EITHER if i >= 4 else READ
        case "modes":
            mode = ("CMYK", "I;16", "1", "LA", "1", "CMYK", "I", "YCbCr")[i % 8]
            name = ("JPEG", "PNG", "PNG", "PNG", "TIFF", "TIFF", "TIFF", "JPEG")[i % 8]
            buffer = io.BytesIO()
            Image.fromarray(grey).convert("RGB" if mode == "CMYK" else "L").convert(mode).save(buffer, name)
            return buffer.getvalue(), LOSSY.get(name, "png"), READ
        case "palette too short":
            image = Image.fromarray(grey, mode="P")
            image.putpalette([7] * 3 * (1 + i))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
            start = data.index(b"PLTE") - 4
            length = struct.unpack(">I", data[start : start + 4])[0]
            short = chunk(b"PLTE", data[start + 8 : start + 8 + 3 * (1 + i)])
            return data[:start] + short + data[start + 12 + length :], "png", EITHER
        case "no side":
            width, height = ((0, 5), (5, 0), (0, 0))[i % 3]
            files = {"png": png(width, height, 8, 2), "gif": b"GIF89a" + struct.pack("<HH", width, height) + bytes(20)}
            files["bmp"] = b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, width, height, 1, 24, *[0] * 6)
            name = ("png", "gif", "bmp")[i % 3]
            return files[name], name, REFUSED
        case "floating point":
            buffer = io.BytesIO()
            values = rng.normal(size=(20, 20)).astype(np.float32)
            values[0, 0] = (np.nan, np.inf)[i % 2]
            Image.fromarray(values).save(buffer, "TIFF")
            return buffer.getvalue(), "tif", REFUSED
        case "tiff of circles":  # a directory that is its own follower, counts of 4 billion, offsets behind the end
            tags = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 2**32 - 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
            tags |= {273: (4, 2**31, 2**32 - 1), 278: (4, 1, 16), 279: (4, 1, 2**32 - 1), 700 + i: (7, 2**32 - 1, 8)}
            data = bytearray(tiff(tags, bytes(300)))
            data[10 + 12 * len(tags) : 14 + 12 * len(tags)] = struct.pack("<I", 8)
            return bytes(data), "tif", REFUSED
        case "many texts":
            info = PngImagePlugin.PngInfo()
            for k in range(2000):
                info.add_text(f"k{k}", "x" * 10 * i)
            return encoded(rng, "PNG", pnginfo=info), "png", EITHER
    return None


FILES = [
    *("cut png", "cut jpeg", "cut tiff", "cut other", "cut interlaced png", "cut progressive jpeg"),
    *("flipped png", "flipped jpeg", "flipped header", "flipped other", "flipped tiff directory"),
    *("wrong extension", "few bytes", "text", "postscript", "wrong checksum", "bad color profile", "bad exif"),
    *("huge png", "huge gif", "huge webp", "huge tiff", "huge header", "long and thin", "text bomb", "pixel bomb"),
    *("many frames", "modes", "palette too short", "no side", "floating point", "tiff of circles", "many texts"),
]
OTHERS = ["fifo", "socket", "link to nothing", "link to itself", "link to a device", "link to a fifo"]
OTHERS += ["huge and sparse"]
OTHERS += [] if os.geteuid() == 0 else ["locked"]  # whom no mode of a file stops
KINDS = FILES + OTHERS


def write(kind: str, i: int, folder: Path, seed: int = 0) -> tuple[Path, str]:
    """Instance i of a kind in a folder: its path, and what must become of it."""
    rng = np.random.default_rng([seed, i, *kind.encode()])
    stem = folder / f"{kind.replace(' ', '_')}_{i}"
    if made := contents(kind, i, rng):
        data, extension, expected = made
        path = stem.with_name(f"{stem.name}.{extension}")
        path.write_bytes(data)
        return path, expected
    path = stem.with_name(f"{stem.name}.{('png', 'jpg', 'tif')[i % 3]}")
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                here = os.open(folder, os.O_RDONLY)
                listening.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's own name must be short
                os.close(here)
        case "link to nothing":
            path.symlink_to("nothing.png")
        case "link to itself":
            path.symlink_to(path.name)
        case "link to a device":
            path.symlink_to(("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom")[i % 4])
        case "link to a fifo":
            os.mkfifo(folder / f".{path.name}")
            path.symlink_to(folder / f".{path.name}")
        case "huge and sparse":  # a terabyte that takes no room on the disk
            heads = encoded(rng, "WEBP"), encoded(rng, "WEBP")[:12], b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x20ftypavif"
            path.write_bytes(heads[i % 4] + (b"\xff" * 8 + b"jp2h" if i % 4 == 2 else b""))
            os.truncate(path, 2**40)
        case "locked":
            path.write_bytes(encoded(rng, "PNG"))
            path.chmod(0)
    return path, REFUSED
