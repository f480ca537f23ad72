"""Pictures of every kind become upright 8-bit RGB; what is no picture is refused in one sentence."""

import base64
import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.modeling import load_image


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """A picture whose four corners differ: a red, a green and a blue ramp."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([x * 255 / width, y * 255 / height, 255 - x * 255 / width], axis=-1)
    return Image.fromarray(array.astype(np.uint8))


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def difference(image: Image.Image, expected: Image.Image) -> float:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean())


def test_path_bytes_data_uri_and_pillow_give_the_same(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(photo()))
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.read_bytes(), uri, Image.open(path), np.asarray(photo())):
        assert difference(load_image(source), photo()) == 0


def test_url(tmp_path):
    (tmp_path / "photo.png").write_bytes(png(photo()))
    (tmp_path / "page.html").write_text("<html>not found</html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert difference(load_image(f"{address}/photo.png"), photo()) == 0
        with pytest.raises(ValueError, match=r"missing\.png' could not be downloaded .*404.*check the address"):
            load_image(f"{address}/missing.png")
        with pytest.raises(ValueError, match=r"page\.html' is not an image of a format Pillow can read"):
            load_image(f"{address}/page.html")
    finally:
        server.shutdown()
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_image(f"{address}/photo.png")


def test_grey_and_palette():
    grey = photo().convert("L")
    assert difference(load_image(png(grey)), grey.convert("RGB")) == 0
    palette = photo().convert("P")
    assert difference(load_image(png(palette)), palette.convert("RGB")) == 0
    assert load_image(png(photo().convert("1"))).mode == "RGB"


def test_transparency_is_laid_over_white():
    image = photo().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    white = Image.new("RGB", image.size, "white")
    assert difference(load_image(png(image)), white) == 0
    image.putalpha(Image.new("L", image.size, 255))
    assert difference(load_image(png(image)), photo()) == 0
    grey = Image.new("LA", (8, 8), (0, 0))
    assert difference(load_image(png(grey)), Image.new("RGB", (8, 8), "white")) == 0
    palette = Image.new("P", (8, 8), 0)
    assert difference(load_image(png(palette, transparency=0)), Image.new("RGB", (8, 8), "white")) == 0


def test_cmyk_jpeg():
    cmyk = photo().convert("CMYK")
    assert difference(load_image(jpeg(cmyk)), photo()) < 6


def test_16_bit_grey_is_scaled_and_not_clipped():
    ramp = (np.mgrid[0:40, 0:60][1] * (65535 / 59)).astype(np.uint16)
    expected = Image.fromarray(np.round(ramp / 257).astype(np.uint8)).convert("RGB")
    image = Image.fromarray(ramp)
    assert image.mode == "I;16"
    assert difference(load_image(png(image)), expected) == 0
    assert difference(load_image(ramp), expected) == 0
    assert difference(load_image(Image.fromarray(ramp.astype(np.int32), "I")), expected) < 1.0
    assert np.asarray(load_image(png(image))).std() > 50, "Pillow's own conversion would be nearly all white"


def test_float_pictures():
    ramp = np.mgrid[0:40, 0:60][1].astype(np.float32) / 59
    assert difference(load_image(Image.fromarray(ramp)), load_image(ramp)) < 1.0
    assert difference(load_image(Image.fromarray(ramp * 255)), load_image(ramp)) < 1.0


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied(orientation):
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = photo() if turns[orientation] is None else photo().transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(load_image(jpeg(stored, exif=exif)), photo()) < 4


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert difference(load_image(tmp_path / "two.gif"), frames[0]) == 0


def test_arrays_and_tensors():
    array = np.asarray(photo())
    expected = photo()
    for source in (
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
        array.astype(np.float64) / 255,
        np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
    ):
        assert difference(load_image(source), expected) == 0
    assert difference(load_image(array[..., 0] > 128), load_image(((array[..., :1] > 128) * 255).astype(np.uint8))) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((5, 4, 7), np.uint8), r"has shape \(5, 4, 7\)"),
        (np.zeros((0, 4, 3), np.uint8), r"has shape \(0, 4, 3\)"),
        (np.full((4, 4, 3), 200.0), "floats outside 0 to 1"),
        (np.full((4, 4, 3), np.nan), "floats outside 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (12, "is of type int"),
        ("data:image/png;utf8,abc", "is no base64 data URI"),
        ("data:image/png;base64,@@@", "holds broken base64"),
        ("data:image/png;base64,aGVsbG8=", "is not an image of a format Pillow can read"),
        (b"hello", "The image given as bytes is not an image"),
        (png(photo())[:-30], "is a broken image"),
        (jpeg(photo())[:200], "image"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_missing_and_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg' does not exist; check the path"):
        load_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        load_image(tmp_path)
    text = tmp_path / "notes.jpg"
    text.write_text("these are notes")
    with pytest.raises(ValueError, match=r"notes\.jpg' is not an image"):
        load_image(text)
