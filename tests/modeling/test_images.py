"""Images of every kind become upright 8-bit RGB; anything else is refused in one sentence."""

import base64
import functools
import http.server
import io
import re
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.modeling import load_image
from bifocal.modeling.image_bifocal import list_images


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """An image whose four corners differ: a red, a green and a blue ramp."""
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


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """An image at a path with a space and a percent sign, below the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a 100% photo.png"
    path.write_bytes(png(photo()))
    return path


def test_everything_that_people_hand_over(written):
    content = written.read_bytes()
    encoded = base64.b64encode(content).decode()
    lines = "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    exact = np.asarray(photo()).astype(np.float32) / 255
    buffer = io.BytesIO(content)
    buffer.seek(0, 2)  # where writing left it
    with open(written, "rb") as file:
        for source in (
            bytearray(content), memoryview(content), io.BytesIO(content), buffer, file,
            {"bytes": content, "path": None}, {"bytes": None, "path": str(written)}, {"bytes": content, "path": "no"},
            written.as_uri(), str(written.as_uri()).replace("file:///", "FILE://localhost/"), f"file://{written}",
            "~/a 100% photo.png", Path("~/a 100% photo.png"), np.str_(written), np.bytes_(content),
            encoded, lines, base64.urlsafe_b64encode(content).decode().rstrip("="),
            f"data:image/png;base64,{encoded}", f"DATA:image/png;BASE64,{lines}",
            "data:image/png;base64," + urllib.parse.quote(encoded, safe=""), "data:," + urllib.parse.quote(content),
            exact * 1.0000001, exact - 1e-7, torch.from_numpy(exact).requires_grad_(),
        ):  # fmt: skip
            assert difference(load_image(source), photo()) == 0, source
    half = torch.from_numpy(exact).bfloat16()
    assert difference(load_image(half), photo()) < 1
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert difference(load_image(exact.astype(ml_dtypes.bfloat16)), load_image(half)) == 0


def test_errors_print_little_of_what_is_encoded(tmp_path):
    noise = base64.b64encode(np.random.default_rng(0).bytes(3000)).decode()
    for source in (noise, noise[:200], f"data:image/png;base64,{noise}", f"data:image/png;base64,{noise[:150]}!"):
        with pytest.raises((ValueError, OSError), match=r"not an image|neither|does not exist|broken base64") as error:
            load_image(source)
        assert len(str(error.value)) < 180
        assert noise[60:100] not in str(error.value)
    long_path = tmp_path / "a_folder_with_a_name" / "and-below-it-a-file-with-a-name-of-many-letters.jpg"
    with pytest.raises(FileNotFoundError, match=re.escape(str(long_path))):
        load_image(long_path)
    with pytest.raises(FileNotFoundError) as error:
        load_image("caf\udce9.png")
    str(error.value).encode()  # may be printed


COLUMNS = r"with 'caption', 'file_name'; give one column, such as images\['file_name"


def test_several_images_and_one():
    one, two = photo(), photo(30, 30)
    array = np.asarray(one)
    for given in (
        [one, two], (one, two), [[one], [two]], [[one, two]], iter([one, two]), {0: one, 1: two}.values(),
        np.array(["a.png", "b.png"]), np.array([Path("a"), Path("b")], object), np.stack([array] * 2),
        torch.zeros(2, 3, 8, 8), [np.stack([array] * 2)],
    ):  # fmt: skip
        items, single = list_images(given)
        assert (len(items), single) == (2, False)
    for given in (one, "a.png", Path("a"), b"", bytearray(), io.BytesIO(), {"path": "a.png"}, array, np.array("a.png")):
        items, single = list_images(given)
        assert (len(items), single) == (1, True)
    pandas = pytest.importorskip("pandas")
    assert list_images(pandas.Series(["a.png", "b.png"])) == (["a.png", "b.png"], False)
    frame = pandas.DataFrame({"caption": ["a"], "file_name": ["a.png"]})
    for table in (frame, {"caption": ["a"], "file_name": ["a.png"]}):
        with pytest.raises(ValueError, match=COLUMNS):
            list_images(table)
    with pytest.raises(ValueError, match="is a set, which has no order"):
        list_images({"a.png", "b.png"})


def test_a_data_set_is_not_a_list_of_images():
    reason = "datasets needs a newer huggingface_hub than the oldest one that loading needs"
    datasets = pytest.importorskip("datasets", reason=reason, exc_type=ImportError)
    with pytest.raises(ValueError, match=COLUMNS):
        list_images(datasets.Dataset.from_dict({"caption": ["a"], "file_name": ["a.png"]}))


def test_one_lazy_image_in_many_threads(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "turned.jpg").write_bytes(jpeg(photo(600, 400).transpose(Image.Transpose.ROTATE_180), exif=exif))
    expected = load_image(tmp_path / "turned.jpg")
    for _ in range(10):
        shared = Image.open(tmp_path / "turned.jpg")
        with ThreadPoolExecutor(8) as pool:
            assert all(difference(image, expected) == 0 for image in pool.map(load_image, [shared] * 8))


def test_url(tmp_path):
    (tmp_path / "photo.png").write_bytes(png(photo()))
    (tmp_path / "page.html").write_text("<html>not found</html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert difference(load_image(f"{address}/photo.png"), photo()) == 0
        with pytest.raises(ValueError, match=r"missing\.png' could not be downloaded .*404.*check the address"):
            load_image(f"{address}/missing.png")
        with pytest.raises(ValueError, match=r"page\.html' is not an image of a format Pillow can read"):
            load_image(f"{address}/page.html")
        assert difference(load_image(address.replace("http", "HTTP") + "/photo.png"), photo()) == 0
    finally:
        server.shutdown()
        server.server_close()
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


def test_float_images():
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
        ("data:image/png;base64", "is not a data URI"),
        ("data:image/png;utf8,abc", "is not an image of a format Pillow can read"),
        ("s3://bucket/a.png", "cannot be read over s3://; give a path or an http"),
        (Image.new("RGB", (0, 0)), "has no pixels"),
        ({"image": b"", "caption": ""}, "is a dict with 'image', 'caption'; give the image itself"),
        (io.StringIO("text"), "opened as text; open it with mode 'rb'"),
        (np.zeros(7), r"has shape \(7,\)"),
        (np.array(["a.png"], object), r"has shape \(1,\)"),
        ("data:image/png;base64,@@@", "holds broken base64"),
        ("data:image/png;base64,aGVsbG8=", "is not an image of a format Pillow can read"),
        (b"hello", "The image given as bytes is not an image"),
        (png(photo())[:-30], "is a broken image"),
        (jpeg(photo())[:200], "image"),
    ],
)
def test_what_is_not_an_image(source, message):
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
