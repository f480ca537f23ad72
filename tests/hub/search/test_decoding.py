"""An index decodes its images in threads, and remembers whether at full or at reduced scale."""

import json

import numpy as np
import pytest

from bifocal.embedding.items import Item
from bifocal.embedding.models import weights_hash
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.search.settings import SETTINGS
from tests.bifocal.commands import error_of, invoke
from tests.modeling.test_image_batches import spots, workers_alive
from tests.modeling.test_images import jpeg, png


def vectors(index: SearchIndex) -> np.ndarray:
    rows = index.snapshot().rows.to_pylist()
    return np.stack([row["embedding"] for row in sorted(rows, key=lambda row: row["name"])])


def photos() -> list[Item]:
    items = [Item(f"{number:02}.jpg", image=jpeg(spots(900 + 40 * number, 700))) for number in range(9)]
    return [*items, Item("cut.jpg", image=items[0].image[:-2000]), Item("small.png", image=png(spots(70, 50)))]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_rows_do_not_depend_on_the_workers(new, num_workers):
    searcher = new(name=f"index {num_workers}")
    result = searcher.add(photos(), batch_size=4, num_workers=num_workers)
    assert workers_alive() == 0
    assert (result.new, result.skipped) == (10, [("cut.jpg", "it is broken")])
    expected = searcher.model.model.encode_image([item.image for item in photos() if item.name != "cut.jpg"])
    np.testing.assert_allclose(vectors(searcher.index), expected, atol=1e-6)


def test_an_index_keeps_its_decoding(model_folder, tmp_path):
    def create(fast: bool | None) -> SearchIndex:
        return SearchIndex.create(
            tmp_path / "index", str(model_folder), weights_hash(model_folder), 40, fast_decoding=fast
        )

    assert not create(None).fast_decoding
    searcher = Searcher(create(True))  # still empty
    searcher.add(photos())
    model, images = searcher.model.model, [item.image for item in photos() if item.name != "cut.jpg"]
    exact = model.encode_image(images)
    found = vectors(searcher.index)
    assert np.einsum("nd,nd->n", found, exact).min() > 0.99
    assert not np.allclose(found, exact, atol=1e-6)
    hit = searcher.search(image=images[4])[0]
    assert (hit.name, hit.score) == ("04.jpg", pytest.approx(1.0, abs=1e-5)), "a query is decoded as the index is"
    assert create(None).fast_decoding
    with pytest.raises(SearchError, match=r"was made with fast decoding .* Omit --no-fast-decoding, or index"):
        create(False)
    settings = json.loads((tmp_path / "index" / SETTINGS).read_text())
    del settings["fast_decoding"]  # as in an index of an earlier version
    (tmp_path / "index" / SETTINGS).write_text(json.dumps(settings))
    assert not create(None).fast_decoding
    with pytest.raises(SearchError, match=r"was made with exact decoding .* Omit --fast-decoding, or index"):
        create(True)
    (tmp_path / "index" / SETTINGS).write_text(json.dumps(settings | {"fast_decoding": "yes"}))
    with pytest.raises(SearchError, match=r"is damaged .fast_decoding"):
        create(None)


def test_the_option_of_the_command(desk):
    (desk / "photos").mkdir()
    for item in photos():
        (desk / "photos" / item.name).write_bytes(item.image)
    arguments = ("index", "photos", "fast", "--model", "model")
    done = invoke(desk, *arguments, "--fast-decoding", "--num-workers", "2")
    assert done.exit_code == 0, done.stderr
    assert "Skipped: cut.jpg: it is broken" in done.stderr
    assert "10 new" in done.stdout
    assert invoke(desk, *arguments).exit_code == 0
    assert "was made with fast decoding" in error_of(desk, *arguments, "--no-fast-decoding")
