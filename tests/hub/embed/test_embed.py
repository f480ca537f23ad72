"""`bifocal embed`: rows are what the model gives, runs resume with what is missing, and nothing else is touched."""

import gzip
import io
import json
import os
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests.bifocal.commands import error_of, invoke
from tests.conftest import small_config
from tests.modeling.test_images import photo
from tests.processes import Process, run

PROMPTS = {"query": "find: ", "document": "text: "}
COUNT = 23


@pytest.fixture(scope="module")
def model_folder(processor, tmp_path_factory):
    torch.manual_seed(0)
    model = BifocalModel(small_config())
    model.config.prompts = PROMPTS
    return export_model(model, tmp_path_factory.mktemp("embed") / "model", processor)


@pytest.fixture
def desk(model_folder, tmp_path):
    """A folder with a model, images with captions, tar-like tables and texts."""
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(COUNT):
        photo(40 + 3 * number, 32 + number).save(tmp_path / "images" / f"{number:02d}.jpg")
        rows.append({"file_name": f"{number:02d}.jpg", "caption": f"photo number {number}"})
    (tmp_path / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in range(3):
        texts = [{"text": f"sentence {file} {number}"} for number in range(10)]
        (tmp_path / f"texts-{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def embed(desk, source, out="out", *options):
    done = invoke(desk, "embed", source, out, "--model", "model", "--rows-per-part", "4", *options)
    assert done.exit_code == 0, done.stderr
    return done


def table(desk, out="out") -> list[dict]:
    """Rows in the order of the parts; the folder is what other readers see."""
    return pq.read_table(desk / out).to_pylist()


def vectors(rows) -> np.ndarray:
    return np.array([row["vector"] for row in rows], np.float32)


def test_rows_are_what_the_model_gives(desk):
    done = embed(desk, "images", "out", "--captions")
    assert "46 embedded, 0 embedded before, 0 skipped; the table is in out." in done.stdout
    rows = table(desk)
    model = BifocalModel.from_pretrained(desk / "model")
    images, captions = rows[::2], rows[1::2]
    assert [row["name"] for row in images] == [f"{n:02d}.jpg" for n in range(COUNT)]
    assert [row["name"] for row in captions] == [f"{n:02d}.jpg#caption" for n in range(COUNT)]
    assert {row["kind"] for row in images} == {"image"}
    assert {row["kind"] for row in captions} == {"text"}
    paths = [desk / "images" / row["name"] for row in images]
    np.testing.assert_allclose(vectors(images), model.encode_image(paths), atol=1e-5)
    texts = [row["text"] for row in captions]
    assert texts == [row["text"] for row in images] == [f"photo number {n}" for n in range(COUNT)]
    np.testing.assert_allclose(vectors(captions), model.encode_document(texts), atol=1e-5)
    assert [os.path.realpath(desk / row["address"]) for row in images] == [os.path.realpath(path) for path in paths]
    with Image.open(io.BytesIO(images[3]["image"])) as thumbnail, Image.open(paths[3]) as image:
        assert thumbnail.size == image.size
    assert {row["address"] for row in captions} == {row["image"] for row in captions} == {None}
    assert len({row["key"] for row in rows}) == 2 * COUNT
    assert len({row["weights"] for row in rows}) == 1


def test_dimensions_and_precisions(desk):
    embed(desk, "texts-0.jsonl", "whole")
    whole = vectors(table(desk, "whole"))
    assert whole.shape == (10, 40)
    expected = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    for precision, kind, scale, atol in (
        ("float32", pa.float32(), 1, 1e-6), ("float16", pa.float16(), 1, 1e-3), ("int8", pa.int8(), 127, 0.5 / 126),
    ):  # fmt: skip
        embed(desk, "texts-0.jsonl", precision, "--dim", "16", "--precision", precision)
        assert pq.read_schema(desk / precision / "part-00000-000000.parquet").field("vector").type == pa.list_(kind, 16)
        np.testing.assert_allclose(vectors(table(desk, precision)) / scale, expected, atol=atol)
    embed(desk, "texts-0.jsonl", "queries", "--query")
    model = BifocalModel.from_pretrained(desk / "model")
    texts = [row["text"] for row in table(desk, "queries")]
    np.testing.assert_allclose(vectors(table(desk, "queries")), model.encode_query(texts), atol=1e-5)
    assert np.abs(vectors(table(desk, "queries")) - whole).max() > 0.01


def test_only_missing_parts_are_embedded(desk):
    embed(desk, "images")
    parts = sorted((desk / "out").glob("part-*.parquet"))
    assert [part.name for part in parts] == [f"part-00000-{n:06d}.parquet" for n in range(6)]
    whole = table(desk)
    states = {part: (part.stat().st_mtime_ns, part.stat().st_ino) for part in parts}
    parts[2].unlink()
    assert "4 embedded, 19 embedded before, 0 skipped" in embed(desk, "images").stdout
    assert "0 embedded, 23 embedded before" in embed(desk, "images").stdout
    again = table(desk)
    assert [row["key"] for row in again] == [row["key"] for row in whole]
    np.testing.assert_allclose(vectors(again), vectors(whole), atol=1e-5)
    for part in parts[:2] + parts[3:]:
        assert (part.stat().st_mtime_ns, part.stat().st_ino) == states[part]


def test_a_killed_run_resumes(desk):
    command = ("-m", "bifocal", "embed", "images", "out", "--model", "model", "--rows-per-part", "2")
    process = Process(*command, cwd=desk)
    for _ in range(3000):
        if len(list((desk / "out").glob("part-*.parquet"))) >= 2:
            break
        time.sleep(0.01)
    process.kill()
    process.finish()
    before = len(list((desk / "out").glob("part-*.parquet")))
    assert before >= 2
    done = invoke(desk, *command[2:])
    assert done.exit_code == 0, done.stderr
    known = int(done.stdout.split(" embedded before")[0].rpartition(" ")[2])
    assert known >= min(2 * before, COUNT) - 1
    embed(desk, "images", "other")
    rows, other = table(desk), table(desk, "other")
    assert [row["key"] for row in rows] == [row["key"] for row in other]
    np.testing.assert_allclose(vectors(rows), vectors(other), atol=1e-5)


def test_a_source_that_changed_is_an_error(desk):
    embed(desk, "texts-0.jsonl", "texts")
    os.utime(desk / "texts-0.jsonl")  # read again, and the same
    assert "0 embedded, 10 embedded before" in embed(desk, "texts-0.jsonl", "texts").stdout
    with (desk / "texts-0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    error = error_of(desk, "embed", "texts-0.jsonl", "texts", "--model", "model", "--rows-per-part", "4")
    assert "1 of the files or parts failed" in error
    command = ("embed", "texts-0.jsonl", "texts", "--model", "model", "--rows-per-part", "4")
    assert "'texts-0.jsonl' has changed since its part 'part-00000-000002' was written" in invoke(desk, *command).stderr
    embed(desk, "images")
    photo(99, 99).save(desk / "images" / "05.jpg")
    command = ("embed", "images", "out", "--model", "model", "--rows-per-part", "4")
    assert "has changed since its part 'part-00000-000001' was written" in invoke(desk, *command).stderr
    assert len(table(desk)) == COUNT


def test_rows_that_cannot_be_read_are_named_and_counted(desk):
    (desk / "images" / "04.jpg").write_bytes((desk / "images" / "04.jpg").read_bytes()[:-60])
    (desk / "images" / "22.jpg").write_text("no image")
    done = embed(desk, "images", "out")
    assert "21 embedded, 0 embedded before, 2 skipped" in done.stdout
    assert "Skipped: 04.jpg: it is broken" in done.stderr
    assert "Skipped: 22.jpg: it cannot be read as an image" in done.stderr
    assert [row["name"] for row in table(desk)] == [f"{n:02d}.jpg" for n in range(22) if n != 4]
    again = embed(desk, "images", "out")
    assert "0 embedded, 21 embedded before, 2 skipped" in again.stdout
    assert "Skipped: 04.jpg: it is broken" in again.stderr


def test_what_could_not_be_read_is_read_by_the_next_run(desk):
    """The part in which a file broke off is written again; an image that is missing is said by every run."""
    texts = "".join(json.dumps({"text": f"sentence {number}"}) + "\n" for number in range(3000))
    whole = gzip.compress(texts.encode())
    (desk / "long.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    options = ("--model", "model", "--rows-per-part", "500")
    first = invoke(desk, "embed", "long.jsonl.gz", "cut", *options)
    assert first.exit_code == 0, first.stderr
    rows = len(table(desk, "cut"))
    assert 0 < rows < 3000
    assert "1 skipped" in first.stdout
    assert (
        f"{rows % 500} embedded, {rows - rows % 500:,} embedded before, 1 skipped"
        in invoke(desk, "embed", "long.jsonl.gz", "cut", *options).stdout
    )
    (desk / "long.jsonl.gz").write_bytes(whole)
    assert "0 skipped" in invoke(desk, "embed", "long.jsonl.gz", "cut", *options).stdout
    assert [row["text"] for row in table(desk, "cut")] == [f"sentence {number}" for number in range(3000)]
    (desk / "images" / "05.jpg").unlink()
    assert "22 embedded, 0 embedded before, 1 skipped" in embed(desk, "images").stdout
    again = embed(desk, "images")
    assert "0 embedded, 22 embedded before, 1 skipped" in again.stdout
    assert "missing image" in again.stderr


def test_a_pattern_of_one_file_takes_a_second_one(desk):
    (desk / "texts-2.jsonl").rename(desk / "later.jsonl")
    (desk / "texts-1.jsonl").unlink()
    embed(desk, "texts-*.jsonl")
    (desk / "later.jsonl").rename(desk / "texts-2.jsonl")
    assert "10 embedded, 10 embedded before" in embed(desk, "texts-*.jsonl").stdout
    assert [row["text"] for row in table(desk)] == [
        f"sentence {file} {number}" for file in (0, 2) for number in range(10)
    ]


def test_a_file_that_comes_between_others_is_refused(desk):
    embed(desk, "texts-*.jsonl")
    (desk / "texts-1.jsonl").rename(desk / "texts-4.jsonl")
    error = error_of(desk, "embed", "texts-*.jsonl", "out", "--model", "model", "--rows-per-part", "4")
    assert "'texts-1.jsonl' was file 2, and 'texts-2.jsonl' is now" in error
    assert len(table(desk)) == 30


def test_sources_of_several_kinds(desk):
    embed(desk, "images/*.jpg", "pattern")
    assert [row["name"] for row in table(desk, "pattern")] == [f"{number:02d}.jpg" for number in range(COUNT)]
    for folder, colour in (("part-a", "red"), ("part-b", "blue")):  # shards of one name
        (desk / "shards" / folder).mkdir(parents=True)
        image = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(image, "PNG")
        with tarfile.open(desk / "shards" / folder / "00000.tar", "w") as tar:
            for name, content in (("1.png", image.getvalue()), ("1.txt", colour.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    embed(desk, "shards/*/*.tar", "tars", "--captions")
    names = [row["name"] for row in table(desk, "tars")]
    assert names == [f"shards/part-{one}/00000.tar/1{of}" for one in "ab" for of in ("", "#caption")]
    done = invoke(desk, "index", "shards/*/*.tar", "index", "--model", "model", "--captions")
    assert done.exit_code == 0, done.stderr
    hits = json.loads(invoke(desk, "search", "index", "red", "--json").stdout)
    assert {hit["name"]: hit["text"] for hit in hits} == {names[0]: "red", names[2]: "blue"}


def test_a_run_that_wrote_nothing_may_be_corrected(desk):
    (desk / "rows.jsonl").write_text('{"sentence": "a"}\n')
    command = ("embed", "rows.jsonl", "out", "--model", "model", "--kind", "text-only")
    assert invoke(desk, *command).exit_code == 1
    done = invoke(desk, *command[:3], "column_mapping.sentence=text", *command[3:])
    assert done.exit_code == 0, done.stderr
    error = error_of(desk, *command[:3], "column_mapping.sentence=text", "limit=1", *command[3:])
    assert "(source.limit: None, not 1)" in error


def test_what_is_there_is_never_mixed_or_replaced(desk):
    embed(desk, "texts-0.jsonl")
    options = ("--model", "model", "--rows-per-part", "4")
    error = error_of(desk, "embed", "texts-0.jsonl", "out", *options, "--dim", "9")
    assert "'out' was written with other settings (dimensions: 40, not 9)" in error
    assert "(source.path: texts-0.jsonl, not texts-1.jsonl)" in error_of(
        desk, "embed", "texts-1.jsonl", "out", *options
    )
    assert "(rows per part: 4, not 4096)" in error_of(desk, "embed", "texts-0.jsonl", "out", "--model", "model")
    (desk / "mine").mkdir()
    (desk / "mine" / "thesis.tex").write_text("x")
    assert "'mine' holds other files" in error_of(desk, "embed", "texts-0.jsonl", "mine", *options)
    assert "'texts-1.jsonl' is a file" in error_of(desk, "embed", "texts-0.jsonl", "texts-1.jsonl", *options)
    part = desk / "out" / "part-00000-000001.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    assert "part-00000-000001.parquet' is damaged" in error_of(desk, "embed", "texts-0.jsonl", "out", *options)
    assert os.listdir(desk / "mine") == ["thesis.tex"]


def test_two_processes_write_the_rows_of_one(desk):
    """Of one split, each process embeds every other part."""
    embed(desk, "images", "one")
    command = ("-m", "bifocal", "embed", "images", "two", "--model", "model", "--rows-per-part", "4", "--workers", "2")
    done = run(*command, cwd=desk)
    assert done.returncode == 0, done.stderr
    one, two = table(desk, "one"), table(desk, "two")
    names = [sorted(path.name for path in (desk / out).glob("*")) for out in ("one", "two")]
    assert names[0] == names[1]
    for column in ("key", "kind", "name", "text", "address", "image", "weights"):
        assert [row[column] for row in two] == [row[column] for row in one]
    np.testing.assert_allclose(vectors(two), vectors(one), atol=1e-5)


def test_an_object_store(desk, monkeypatch):
    boto3 = pytest.importorskip("boto3", reason="needs boto3 and moto, which `dev` brings")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="vectors")
        out = f"s3://vectors/a/b?scheme=http&endpoint_override={host}:{port}"
        assert "10 embedded, 0 embedded before" in embed(desk, "texts-0.jsonl", out).stdout
        objects = sorted(entry["Key"] for entry in client.list_objects_v2(Bucket="vectors")["Contents"])
        parts = [f"a/b/part-00000-{n:06d}.parquet" for n in range(3)]
        assert objects == ["a/b/_embed.json", *parts]
        client.delete_object(Bucket="vectors", Key=parts[1])
        assert "4 embedded, 6 embedded before" in embed(desk, "texts-0.jsonl", out).stdout
        embed(desk, "texts-0.jsonl", "local")
        local = table(desk, "local")
        content = [client.get_object(Bucket="vectors", Key=part)["Body"].read() for part in parts]
        remote = [row for part in content for row in pq.read_table(io.BytesIO(part)).to_pylist()]
        assert [row["name"] for row in remote] == [row["name"] for row in local]
        np.testing.assert_allclose(vectors(remote), vectors(local), atol=1e-5)
        nowhere = out.replace("vectors", "nothing")
        error = error_of(desk, "embed", "texts-0.jsonl", nowhere, "--model", "model")
        assert "cannot be written (" in error
    finally:
        server.stop()
