"""A static site in a real browser: it finds what Python finds, asks no other host, and says what is wrong."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bifocal.embedding.items import KINDS
from bifocal.files import NotOursError
from bifocal.hub.export import with_model_max_length
from bifocal.hub.onnx import OnnxEncoder
from bifocal.hub.push import validate_folder
from bifocal.hub.search.ranking import best_things
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.static_site import arguments
from bifocal.hub.static_site import site as site_module
from bifocal.hub.static_site.arguments import SiteError
from bifocal.hub.static_site.site import write_site
from bifocal.modeling import BifocalProcessor
from tests.browser import check_layout, needs_browser
from tests.conftest import LONG
from tests.hub.search.conftest import sample_items
from tests.hub.search.serving import EVIL
from tests.hub.static_site.conftest import PROMPT, TITLE

pytestmark = needs_browser
TEXTS = ["a blue star on paper", "x", "Ünïcode, a çross; 東京 ★ 😀 (N.B.)", "  spaced\n out\ttext ", EVIL, LONG]
# Of a ranking score: vectors have 8 bits, and a score of some small collection differs by 0.01 for that.
TOLERANCE = 0.05
SEARCH = """([text, row, kinds]) => client.search({text, row, weight: 0.5, k: 12, rankings: kinds}).then(
    ({rankings, vector, cut}) => ({vector: [...vector], cut, rankings}))"""
ROWS = 69 + 65 + 32  # images, texts, captions, of which one is a text, too
KINDS_OF_VIEWS = [["image", "text"], ["image"], ["text"]]


def opened(page, host):
    from playwright.sync_api import expect

    page.goto(host.address)
    expect(page.locator("#bf-loading")).to_be_empty(timeout=60_000)
    return page


@pytest.fixture(scope="module")
def searcher(site) -> Searcher:
    return Searcher(site.index)


def check_rankings(site, vector, rankings, without=()) -> None:
    """Compare the hits of a site with those of its index for the same vector; close ones may change places."""
    for kinds, hits in zip(KINDS_OF_VIEWS, rankings, strict=True):
        ranking = [hit for hit in site.index.search(vector, 1000, kinds) if hit.name not in without]
        by_name = {hit.name: hit for hit in ranking}
        expected = [by_name[hit["name"]] for hit in hits]
        assert len({hit.name for hit in expected}) == len(hits) == 12
        found = [hit.ranking_score for hit in expected]
        np.testing.assert_allclose(found, [hit.ranking_score for hit in ranking[:12]], atol=TOLERANCE)
        assert [hit["text"] for hit in hits] == [hit.text for hit in expected]
        same = [pair for pair in zip(hits, expected, strict=True) if pair[0]["caption"] == pair[1].caption]
        assert len(same) > 8, "an image and its caption may be equally close"
        for hit, other in same:
            assert hit["score"] == pytest.approx(other.score, abs=0.01)


def test_texts_find_what_python_finds(page, host, site, searcher):
    opened(page, host)
    processor = with_model_max_length(searcher.model.model.processor, searcher.model.model)
    encoder = OnnxEncoder(site.folder / "model" / "onnx", processor, "int8", no_overflow=True)
    for text in TEXTS:
        answer = page.evaluate(SEARCH, [text, None, KINDS_OF_VIEWS])
        vector = np.array(answer["vector"], np.float32)
        assert vector @ encoder.encode_text([PROMPT + text.strip()])[0] > 0.9999, "the same file in Python"
        assert vector @ searcher.vector(text) > 0.999, "float32, as far as int8 weights allow"
        assert answer["cut"] == (text == LONG)
        check_rankings(site, vector, answer["rankings"])
    # The folder of the model is one that Python reads, too.
    same = BifocalProcessor.from_pretrained(site.folder / "model").tokenizer
    assert same(TEXTS[2])["input_ids"] == processor.tokenizer(TEXTS[2])["input_ids"]


def test_an_image_and_its_caption_are_one_hit(page, host, site):
    from playwright.sync_api import expect

    opened(page, host)
    caption, *_ = [item.text for item in sample_items() if item.image is not None]
    page.fill("#bf-text", caption)
    page.get_by_label("Images only").check()
    page.click("#bf-go")
    matched = page.locator("#bf-results .bf-image", has_text="Matched its caption")
    expect(matched.first).to_contain_text("0.png")
    page.get_by_label("Texts only").check()
    page.click("#bf-go")
    expect(page.locator("#bf-results .bf-hit")).to_have_count(12)
    expect(page.locator("#bf-results small", has_text="notes.txt")).to_have_count(1)
    expect(page.locator("#bf-results small", has_text="#caption")).to_have_count(0)


def test_more_like_an_image_of_the_collection(page, host, site):
    from playwright.sync_api import expect

    opened(page, host)
    page.fill("#bf-text", "a blue star on paper")
    page.press("#bf-text", "Enter")
    hits = page.locator("#bf-results .bf-hit")
    expect(hits).to_have_count(12)
    expect(page.locator("#bf-results .bf-text p").first).to_have_text("a blue star on paper")
    page.get_by_label("Two rankings").check()
    page.click("#bf-go")
    expect(page.locator("#bf-results h2")).to_have_text(["Images", "Texts"])
    expect(hits).to_have_count(24)
    image = page.locator("#bf-results .bf-image").first
    name = image.locator("small").inner_text()
    image.get_by_role("button").click()
    expect(page.locator("#bf-query-image img")).to_have_count(1)
    expect(page.locator("#bf-text")).to_have_value("")
    expect(page.locator("#bf-results .bf-image small", has_text=re.compile(f"^{re.escape(name)}$"))).to_have_count(0)
    vectors = np.concatenate(list(site.index.snapshot().vectors()))
    names = site.index.snapshot().rows.column("name").to_pylist()
    row = next(row for row, known in enumerate(names) if known.endswith(f"/{name}"))
    answer = page.evaluate(SEARCH, ["", row, KINDS_OF_VIEWS])
    np.testing.assert_allclose(answer["vector"], vectors[row], atol=0.005)
    check_rankings(site, vectors[row], answer["rankings"], without=[names[row]])
    page.click("#bf-clear")
    expect(page.locator("#bf-query-image img")).to_have_count(0)
    page.click("#bf-go")
    expect(page.locator("#bf-results").get_by_role("alert")).to_have_text("Enter a text, or choose an image.")


def test_an_image_of_the_visitor(page, host, site, searcher, tmp_path):
    from playwright.sync_api import expect

    opened(page, host)
    assert not any("vision_model" in path for path in host.paths), "loaded when it is needed"
    item = next(item for item in sample_items() if item.name == "drawings/10.png")
    (tmp_path / "query.png").write_bytes(item.image)
    page.get_by_label("Images only").check()
    page.set_input_files("#bf-upload", tmp_path / "query.png")
    expect(page.locator("#bf-results .bf-hit small").first).to_have_text("10.png", timeout=30_000)
    # Any size and any colour mode: the browser prepares an image as Pillow does.
    drawing = Image.radial_gradient("L").resize((301, 180)).convert("RGBA")
    drawing.putalpha(Image.linear_gradient("L").resize((301, 180)))
    drawing.save(tmp_path / "drawing.png")
    page.set_input_files("#bf-upload", tmp_path / "drawing.png")
    script = "client.search({image: example.image, k: 1, rankings: [['image']]}).then(({vector}) => [...vector])"
    assert page.evaluate(script) @ searcher.vector(image=tmp_path / "drawing.png") > 0.99
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image")
    page.set_input_files("#bf-upload", tmp_path / "broken.png")
    alert = page.locator("#bf-results").get_by_role("alert")
    expect(alert).to_have_text("The image cannot be used: it cannot be read as an image. Choose another one.")


def test_images_are_resized_as_pillow_does(page, host):
    page.goto(host.address)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    script = """async ([data, width, height, filter]) => {
        const {resize} = await import("./images.js");
        return [...resize({data: Uint8ClampedArray.from(data), width: 61, height: 37}, width, height, filter)];
    }"""
    for filter in (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        for size in ((20, 12), (61, 80), (90, 37), (130, 5)):
            found = page.evaluate(script, [pixels.ravel().tolist(), *size, int(filter)])
            expected = np.asarray(Image.fromarray(pixels).resize(size, filter), int).ravel()
            np.testing.assert_allclose(found, expected, atol=1)


def test_equal_scores_are_ordered_as_in_python(page, host):
    page.goto(host.address)
    random = np.random.default_rng(0)
    vectors, groups = random.integers(1, 4, (80, 2)), random.integers(0, 4, 80)  # images, texts, captions, both
    captions = np.flatnonzero(groups >= 2).tolist()
    images_of = {row: sorted(random.choice(np.flatnonzero(groups == 0), 2, replace=False).tolist()) for row in captions}
    pairs = [(row, image) for row, images in images_of.items() for image in images]
    script = """async ([groups, pairs, vectors, rankings]) => {
        const {Vectors} = await import("./vectors.js");
        const site = {dimensions: 2, samples: {}, vectors: [{first_row: 0}]};
        const found = new Vectors(site, Uint8Array.from(groups), Int32Array.from(pairs), [Int8Array.from(vectors)]);
        const query = Float32Array.from([0.8, 0.6]);
        return {scores: [...found.scores(query)], rankings: found.rank(query, rankings, 30)};
    }"""
    data = [groups.tolist(), np.ravel(pairs).tolist(), vectors.ravel().tolist(), KINDS_OF_VIEWS]
    answer = page.evaluate(script, data)
    scores = answer["scores"]
    for kinds, hits in zip(KINDS_OF_VIEWS, answer["rankings"], strict=True):

        def things_of(row: int, kinds: list[str] = kinds) -> list[int]:
            images = [row] if groups[row] == 0 else sorted(images_of.get(row, ()), key=lambda image: -scores[image])
            texts = [row] if groups[row] in (1, 3) else []
            return images * ("image" in kinds) + texts * ("text" in kinds)

        expected = best_things([(score, score, row) for row, score in enumerate(scores)], things_of, 30)
        assert [(hit["row"], hit["matched"]) for hit in hits] == [(match.thing, match.row) for match in expected]


def test_texts_are_no_html_and_images_stay_in_their_cards(page, host):
    from playwright.sync_api import expect

    opened(page, host)
    expect(page.get_by_role("heading", level=1)).to_have_text(TITLE)
    page.fill("#bf-text", EVIL)
    page.get_by_label("Hits").fill("60")
    page.press("#bf-text", "Enter")
    hits = page.locator("#bf-results .bf-hit")
    expect(hits).to_have_count(60)
    expect(page.locator("#bf-results .bf-hit p", has_text="onerror")).to_have_text(EVIL)
    page.get_by_label("Images only").check()
    page.click("#bf-go")
    expect(page.locator("#bf-results .bf-image")).to_have_count(60)
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    check_layout(page)


def test_no_other_host_is_asked_even_if_a_script_tries(page, host):
    opened(page, host)
    other = host.address.replace("127.0.0.1", "localhost") + "elsewhere"
    assert page.evaluate(f"fetch('{other}', {{mode: 'no-cors'}}).then(() => 'loaded', () => 'refused')") == "refused"
    worker = f"fetch('{other}', {{mode: 'no-cors'}}).then(() => postMessage('loaded'), () => postMessage('refused'))"
    script = """source => new Promise(resolve => {
        const worker = new Worker(URL.createObjectURL(new Blob([source], {type: "text/javascript"})), {type: "module"});
        worker.onmessage = ({data}) => resolve(data);
    })"""
    assert page.evaluate(script, worker) == "refused"
    assert not any("elsewhere" in path for path in host.paths)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE = {
    "worker.js": (lambda content: None, "A script of this site cannot be loaded (worker.js or vectors.js)"),
    "lib/transformers.web.min.js": (lambda content: None, "transformers.web.min.js"),
    "lib/ort-wasm-simd-threaded.wasm": (lambda content: None, "cannot be loaded (status 404)"),
    "model/onnx/text_model_int8.onnx": (lambda content: content[:130], "has 130 bytes instead of"),
    "model/tokenizer.json": (lambda content: None, "'model/tokenizer.json' of this site cannot be loaded"),
    "data/vectors-000.dat": (flipped, "'data/vectors-000.dat' of this site is damaged"),
    "data/site.json": (lambda content: content[:100], "'data/site.json' of this site is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(name, page, host, site):
    from playwright.sync_api import expect

    damage, expected = DAMAGE[name]
    host.replaced[name] = damage((site.folder / name).read_bytes())
    page.goto(host.address)
    expect(page.locator("#bf-loading").get_by_role("alert")).to_contain_text(expected, timeout=30_000)
    expect(page.locator("#bf-loading")).to_contain_text("pload the site again.")


def test_a_damaged_file_of_items_is_named(page, host, site):
    from playwright.sync_api import expect

    host.replaced["data/items/000000.dat"] = None
    opened(page, host)
    page.fill("#bf-text", "a star")
    page.press("#bf-text", "Enter")
    alert = page.locator("#bf-results").get_by_role("alert")
    expect(alert).to_contain_text("'data/items/000000.dat' of this site cannot be loaded (status 404)")


def test_what_is_written(site, tmp_path):
    assert re.search(
        r"site has 69 images with 32 captions and 66 texts in 1\d\.\d MB \(libraries 14\.\d, model 0\.\d, ", site.output
    )
    for tower in KINDS:
        cosines = rf"The {tower} tower has int8 weights: the cosine of its vectors to those in float32 is ([01]\.\d+)"
        assert float(re.search(cosines, site.output)[1]) > 0.99
    upload = validate_folder(site.folder)
    assert upload.space_sdk == "static"
    assert max(upload.files.values()) < 100 * 2**20
    index = (site.folder / "index.html").read_text()
    assert "<b>" not in index
    assert str(site.folder.parents[3]) not in "".join(
        path.read_text() for path in site.folder.rglob("*.js*") if "lib" not in path.parts
    ), "no path of this machine"
    # Without images of visitors, and in the place of the first one.
    summary = write_site(site.index, tmp_path / "site", "Shapes")
    assert (tmp_path / "site" / "index.html").read_text().count("hidden disabled") == 1
    assert not list((tmp_path / "site").rglob("vision_model*"))
    assert list(summary.differences) == ["text"]
    assert json.loads((tmp_path / "site" / "data" / "site.json").read_text())["rows"] == ROWS
    (tmp_path / "site" / "page.js").write_text("mine")
    with pytest.raises(NotOursError, match=r"'page\.js' in '.*site' was changed after Bifocal wrote it"):
        write_site(site.index, tmp_path / "site")


def test_what_is_refused(site, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    for folder, expected in (
        (tmp_path / "mine", r"holds 'index\.html' and no list of files"),
        (site.index.folder / "site", "lies in '.*index', which is copied into the static site"),
    ):
        with pytest.raises(NotOursError, match=expected):
            write_site(site.index, folder)
    with monkeypatch.context() as patched:
        patched.setattr(site_module, "load_model", lambda *_: SimpleNamespace(is_joint=False))
        with pytest.raises(SiteError, match="is a model of sentence-transformers, which is not exported for browsers"):
            write_site(site.index, tmp_path / "new")
    monkeypatch.setattr(arguments, "MAX_ITEMS", 100)
    with pytest.raises(SiteError, match=f"has {ROWS} items, but a browser searches 100 at most"):
        write_site(site.index, tmp_path / "new")
    assert not (tmp_path / "new").exists()
