"""Images are read only below the roots that a recipe names."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bifocal.data.loading import load_source
from bifocal.data.skips import SkipLog
from bifocal.data.source import Source
from tests.data.files import good, image_bytes, lines, row_errors, stream


def test_nothing_outside_the_roots_is_read(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jpg").write_bytes(image_bytes())
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image_bytes())
    (root / "link.jpg").symlink_to(secret)
    (root / "inside.jpg").symlink_to(root / "a.jpg")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "b.jpg").write_bytes(image_bytes())
    (root / "folder").symlink_to(tmp_path)
    given = [
        "a.jpg", "inside.jpg", "../secret.jpg", str(secret), "link.jpg", "folder/secret.jpg", "../root2/b.jpg",
        "http://127.0.0.1:9/a.jpg", "file:///etc/passwd", "x/../../secret.jpg", "a.jpg\x00.png",
    ]  # fmt: skip
    path = lines(root / "metadata.jsonl", [{"file_name": name, "caption": name} for name in given])
    opened: list[str] = []
    real = open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: opened.append(str(file)) or real(file, *a, **k))
    found = stream(path)
    assert [row["caption"] for row in good(found)] == ["a.jpg", "inside.jpg"]
    causes = list(row_errors(found).values())
    assert causes == ["path outside the roots"] * 8 + ["control characters"]
    assert not any("secret" in name or "root2" in name for name in opened)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_struct", [False, True])
def test_a_data_set_that_is_loaded_names_no_file_elsewhere(tmp_path, streaming, as_struct):
    """What datasets loads may hold paths, too; they lead only to what it has loaded."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image_bytes())
    (tmp_path / "repo").mkdir()
    inside = tmp_path / "repo" / "a.jpg"
    inside.write_bytes(image_bytes())
    paths = [str(inside), str(secret), "../secret.jpg", "http://127.0.0.1:9/a.jpg"]
    rows = [{"image": {"bytes": None, "path": path} if as_struct else path, "caption": "c"} for path in paths]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "repo" / "train.parquet")
    source = Source(path=str(tmp_path / "repo"), format="hub", streaming=streaming, max_bad_fraction=0.9)
    skipped = SkipLog()
    data = load_source(source, "image-text", 0, skipped, "t")
    if streaming:
        assert [json.loads(row["_row_error"])[1] if row["_row_error"] else "" for row in data] == [
            "",
            *["path outside the roots"] * 3,
        ]
    else:
        assert len(data) == 1
        assert skipped.bad["t"] == {"path outside the roots": 3}


def test_paths_in_shares_of_sharegpt4v_stay_in_their_root(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(image_bytes())
    answer = [{"from": "gpt", "value": "A caption."}]
    rows = [{"image": name, "conversations": answer} for name in ("coco/../../etc/passwd", "/etc/passwd", "coco/1.jpg")]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(rows))
    found = stream(path, image_root={"coco": str(tmp_path / "coco")})
    assert [row["image"] for row in good(found)] == [str(tmp_path / "coco" / "1.jpg")]
    assert set(row_errors(found).values()) == {"path outside the roots"}


# Counts, the log, the limit
