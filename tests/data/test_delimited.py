"""CSV and TSV: as Python's csv module reads a well-formed file, and no row lost in silence where it is not."""

import csv
import gzip
import io
import json
import random

import pytest

from bifocal.data.delimited import read_csv
from bifocal.data.loading import load_source, open_stream
from bifocal.data.skips import RowError, SkipLog
from bifocal.data.source import Source, parse_source
from bifocal.errors import DataError, RecipeError
from tests.data.files import good, row_errors


def stream(path, kind: str = "text-pair", **options):
    return open_stream(Source(path=str(path), **options), kind)


def read(path, **options) -> list:
    return list(read_csv(str(path), **options))


def plain(rows) -> list:
    return [(row.name, row.position, str(row.value)) for row in rows]


def values(rows) -> list[list[str]]:
    return [list(row.value.values()) for row in rows if not isinstance(row.value, RowError)]


PIECES = [
    "a",
    "Ω",
    "two words",
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\r",
    " ",
    "'",
    '12"',
    ", and so",
    "\\",
    "#",
]


@pytest.mark.parametrize("seed", range(60))
def test_a_well_formed_file_reads_as_pythons_csv_reads_it(tmp_path, seed):
    """Any characters in any field, and reading on from each position; the reference is `csv.reader`."""
    draw = random.Random(seed)
    columns, delimiter = draw.randint(1, 4), draw.choice(",;|\t")
    names = [f"c{n}" for n in range(columns)]
    rows = [
        ["".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(columns)]
        for _ in range(draw.randint(1, 30))
    ]
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=delimiter, lineterminator=draw.choice(["\n", "\r\n", "\r"]),
        quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )  # fmt: skip
    writer.writerows([names, *rows])
    content = text.getvalue()
    path = tmp_path / "a.csv"
    path.write_bytes((b"\xef\xbb\xbf" if draw.random() < 0.3 else b"") + content.encode())
    if draw.random() < 0.3:
        path = tmp_path / "a.csv.gz"
        path.write_bytes(gzip.compress(content.encode()))
    reference = [row for row in list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))[1:] if row]
    found = read(path, delimiter=delimiter, quoting="minimal")
    blank = sum(columns > 1 and len(row) == 1 and not row[0].strip() for row in reference)
    # With "\r" as the end of a line, the writer does not quote "\n", so that some rows break in two.
    assert values(found) == [row for row in reference if len(row) == columns]
    assert len(found) == len(reference) - blank
    for number in draw.sample(range(len(found)), min(5, len(found))):
        position = json.loads(json.dumps(found[number].position))
        again = read(path, start=position, delimiter=delimiter, quoting="minimal")
        assert plain(again) == plain(found[number + 1 :])


WORDS = ["a cat", "two dogs", "on the mat", "say 'hi'", "it costs 1.50", "rows of houses", "Ω"]


@pytest.mark.parametrize("seed", range(40))
def test_a_quote_that_never_closes_costs_its_own_row_and_no_other(tmp_path, seed):
    """Stray quotes before texts, some of which a later inch sign would close, next to captions of several lines."""
    draw = random.Random(seed)
    count = draw.randint(50, 300)
    rows = [[f"{n}.jpg", ", ".join(draw.choices(WORDS, k=draw.randint(1, 3)))] for n in range(count)]
    lined = set(draw.sample(range(count), 10))
    for number in lined:
        rows[number][1] = "\n".join(", ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(3))
    stray = sorted(set(draw.sample(range(count), draw.randint(1, 4))) - lined)
    inches = {
        number
        for number in draw.sample(range(count), 2)
        if number not in lined and not {number, number - 1} & set(stray)
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption"])
    first = {}
    for number, row in enumerate(rows):
        first[number] = text.getvalue().count("\n") + 1
        if number in stray:
            row[1] = row[1].replace(",", ";")
            text.write(f'{row[0]},"{row[1]}\n')
        elif number in inches:
            row[1] = row[1].replace(",", ";") + ' of 5"'
            text.write(f"{row[0]},{row[1]}\n")
        else:
            writer.writerow(row)
    path = tmp_path / "a.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    found = read(path)
    bad = {row.name: row.value.cause for row in found if isinstance(row.value, RowError)}
    assert {f"a.csv:{first[number]}" for number in stray} <= set(bad)
    assert values(found) == [row for n, row in enumerate(rows) if f"a.csv:{first[n]}" not in bad]
    # Where an inch sign closes a stray quote, the rows between may be one field.
    lost = {name for name, cause in bad.items() if cause != "ambiguous quote"}
    assert lost <= {f"a.csv:{first[number]}" for number in stray}
    for number in (0, *stray[:1], len(found) - 2):
        assert plain(read(path, start=found[number].position)) == plain(found[number + 1 :])


def test_streamed_and_not_the_same_rows_are_read_and_the_same_are_bad(tmp_path):
    lines = [f"q {n},p {n}" for n in range(500)]
    lines[20], lines[100], lines[300], lines[301] = 'q 20,"p 20', 'q 100,"p 100', "q 300,p,p", "q 301"
    lines[7] = 'q 7,"a caption, quoted,\nof three lines,\nand right"'
    path = tmp_path / "a.csv"
    path.write_text("query,positive\n" + "\n".join(lines), encoding="utf-8")
    skipped = SkipLog(tmp_path / "skipped.jsonl")
    data = load_source(Source(path=str(path)), "text-pair", 0, skipped, "t")
    assert len(data) == 496
    assert skipped.bad == {"t": {"open quote": 2, "broken CSV": 2}}
    logged = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in logged] == ["a.csv:24", "a.csv:104", "a.csv:304", "a.csv:305"]
    assert "'q 20,\"p 20'" in logged[0]["detail"]
    streamed = stream(path, streaming=True)
    assert good(streamed) == data.to_list()
    assert list(row_errors(streamed)) == [line["row"] for line in logged]
    assert data[7]["positive"].count("\n") == 2
    for readers in (1, 2, 3):  # in parts, each stopped after every block and gone on with from its state
        names = []
        for number in range(readers):
            part = streamed.part(number, readers)
            part.open(0)
            while (block := part.next(50)) is not None:
                names += [*block.names, *(skip.row for skip in block.skips)]
                state = json.loads(json.dumps(part.state()))
                part = streamed.part(number, readers)
                part.open(0, state)
        assert sorted(names) == sorted(name for name, _ in streamed.rows())


def test_what_quotes_enclose_is_one_field_if_one_says_so(tmp_path):
    """Rows within a field, as in a column that holds tables, look like a quote that never closes."""
    path = tmp_path / "a.csv"
    path.write_text('query,positive\nq,"a,b\n1,2\n3,4\n5,6"\nlast,row\n')
    assert list(row_errors(stream(path))) == ["a.csv:2", "a.csv:3", "a.csv:4", "a.csv:5"]
    assert [row["query"] for row in good(stream(path))] == ["last"]
    assert [row["query"] for row in good(stream(path, quoting="minimal"))] == ["q", "last"]
    path.write_text('query,positive\nq 1,"p 1\nq 2,p "2"\n')
    assert good(stream(path, quoting="none")) == [
        {"query": "q 1", "positive": '"p 1'}, {"query": "q 2", "positive": 'p "2"'},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "label"),
    [
        ('1,"open quote,a\n2,fine,b\n3,TV of 42",c', True),
        ('1,"open quote,a\n2,TV of 42",c', True),
        ('1,"open quote\n2,TV of 42"', False),
        ('1,"Prices:\n1,000 people\n2,500 dogs"', False),
        ('1,"a, b","open\n2,x,y"', True),
    ],
)
def test_what_may_be_one_row_or_several_is_neither(tmp_path, record, label):
    """Each of its lines is bad and named, with what to set; also for a reader that continues in the middle."""
    path = tmp_path / "a.csv"
    path.write_text(f"id,text{',label' * label}\n0,a{',b' * label}\n{record}\n9,next{',d' * label}\n")
    found = read(path)
    lines = record.count("\n") + 1
    assert [row[0] for row in values(found)] == ["0", "9"]
    bad = [row for row in found if isinstance(row.value, RowError)]
    assert [row.name for row in bad] == [f"a.csv:{3 + number}" for number in range(lines)]
    assert {row.value.cause for row in bad} == {"ambiguous quote"}
    assert all("set quoting=minimal if it is one field, or quoting=none" in row.value.detail for row in bad)
    for number, row in enumerate(found):
        assert plain(read(path, start=json.loads(json.dumps(row.position)))) == plain(found[number + 1 :])
    assert len(values(read(path, quoting="minimal"))) == 3
    if '","' not in record:
        assert len(values(read(path, quoting="none"))) == 2 + (lines if "Prices" not in record else 3)


def test_texts_of_several_lines_before_and_after_other_fields(tmp_path):
    """They are rows, whatever their commas: prose has a space after them, or the first line alone is not a row."""
    rows = [
        ["Hello\nbye", "x"], ["Hello, you\nand, well, me", "x"], ["one\n\ntwo\nthree", "x"], ["a", "Hello\nbye, you"],
        ["a", "x, y\nz"], ["a\nb", "c\nd"],
    ]  # fmt: skip
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    assert values(read(path)) == rows


def test_tabs_and_quotes(tmp_path):
    """In a TSV file a quote is a character; where quotes enclosed fields, the error says what to set."""
    path = tmp_path / "a.tsv"
    path.write_text('query\tpositive\n"q\t12" disc\n"a\nb"\tp\n')
    found = stream(path)
    assert good(found) == [{"query": '"q', "positive": '12" disc'}, {"query": 'b"', "positive": "p"}]
    (row,) = [row for _, row in found.rows() if isinstance(row, RowError)]
    assert "1 fields, but the file has 2 columns; set quoting=minimal" in row.detail
    path.write_text('query\tpositive\n"a\nb"\tp\n')
    assert good(stream(path, quoting="minimal")) == [{"query": "a\nb", "positive": "p"}]
    (tmp_path / "a.txt").write_text("query\tpositive\nq\tp\n")
    assert good(stream(tmp_path / "a.txt", format="tsv")) == [{"query": "q", "positive": "p"}]


def test_odd_but_right(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b",query , positive,x,x\r\n0,a,b,,\r\n\r\n   \r\n1,c,d,1,2\r2,e,f,,\n3,g,h,,")
    assert [row.value for row in read(path)] == [
        {"query": q, "positive": p, "x": x, "x.1": y}
        for q, p, x, y in (("a", "b", "", ""), ("c", "d", "1", "2"), ("e", "f", "", ""), ("g", "h", "", ""))
    ]
    assert [row.name for row in read(path)] == ["a.csv:2", "a.csv:5", "a.csv:6", "a.csv:7"]
    path.write_bytes(b"query,positive\na,b\0c\nlong," + b"x" * 200_000 + b"\nd,e")
    found = stream(path)
    assert [row["query"] for row in good(found)] == ["long", "d"]
    assert list(row_errors(found)) == ["a.csv:2"]
    path.write_text("query,query,positive\na,b,c\n")
    with pytest.raises(
        DataError, match=r"two columns 'query' \(the second is read as 'query.1'\).*mapping.query.1=query"
    ):
        stream(path)
    assert good(stream(path, column_mapping={"query.1": "query"}))[0]["query"] == "b"


def test_a_row_that_is_longer_than_any(tmp_path, monkeypatch):
    monkeypatch.setattr("bifocal.data.delimited._LONGEST_ROW", 1000)
    path = tmp_path / "a.csv"
    path.write_text("query,positive\na," + "x" * 3500 + '\nb,c\nd,"e\n' + "f,g\n" * 400 + "h,i\n")
    found = read(path)
    assert {row.name: row.value.cause for row in found if isinstance(row.value, RowError)} == {
        "a.csv:2": "row too long", "a.csv:4": "open quote",
    }  # fmt: skip
    assert len(values(found)) == 402


TEXT = "query,positive\nfür,schön\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a.csv' is empty \(0 bytes\)"),
        ("a.tsv", b"", r"a.tsv' is empty \(0 bytes\)"),
        ("a.json", b"", r"a.json' is empty \(0 bytes\)"),
        ("a.jsonl", b"", r"a.jsonl' is empty \(0 bytes\)"),
        ("a.parquet", b"", r"a.parquet' is empty \(0 bytes\)"),
        ("a.arrow", b"", r"a.arrow' is empty \(0 bytes\)"),
        ("a.tar", b"", r"a.tar' is empty \(0 bytes\)"),
        ("a.csv.gz", b"", r"a.csv.gz' is empty \(0 bytes\)"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz' has no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl' has no rows"),
        ("a.json", b" [ ] ", "a.json' has no rows"),
        ("a.tar", b"\0" * 10240, "a.tar' has no rows"),
        ("a.csv", b"query,positive\n", r"a.csv' has a header \(query, positive\), but no rows"),
        ("a.csv", b"query;positive\na;b\n", "has a semicolon where a comma was expected; set delimiter=';'"),
        ("a.csv", b"query\tpositive\na\tb\n", r"has a tab where a comma was expected; set delimiter='\\t'"),
        ("a.tsv", b"query,positive\na,b\n", "has a comma where a tab was expected; set delimiter=','"),
        ("a.tsv", b'"query"\t"positive"\n"a"\t"b"\n', "quotes enclose the names.*set quoting=minimal"),
        ("a.csv", TEXT.encode("utf-16"), "not UTF-8.*byte order mark of UTF-16; set encoding=utf-16"),
        ("a.jsonl", TEXT.encode("utf-32"), "byte order mark of UTF-32; set encoding=utf-32"),
        ("a.csv", TEXT.encode("utf-16-le"), "zero bytes as utf-16-le has them; set encoding=utf-16-le"),
        ("a.json", TEXT.encode("utf-32-be"), "zero bytes as utf-32-be has them; set encoding=utf-32-be"),
        ("a.csv", "été,positive\na,b\n".encode("cp1252"), "not UTF-8.*in the header.*set encoding if"),
        ("a.csv", b'"query,positive\na,b\n', "open quote.*in the header"),
        ("a.jsonl", b'{\n "query": "a"\n}\n', "an object over several lines; write one object a line"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_one_sentence_says_what_was_seen_and_what_to_set(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    kind = "image-text" if name.endswith("tar") else "text-pair"
    with pytest.raises(DataError, match=message):
        load_source(Source(path=str(tmp_path / name), streaming=streaming), kind)


def test_the_settings_do_what_they_say(tmp_path):
    expected = [{"query": "für", "positive": "schön"}]
    for encoding in ("utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-32", "utf-16-be"):
        (tmp_path / "a.csv").write_bytes(TEXT.encode(encoding))
        (tmp_path / "a.jsonl").write_bytes(json.dumps(expected[0], ensure_ascii=False).encode(encoding))
        (tmp_path / "a.json").write_bytes(json.dumps(expected, ensure_ascii=False).encode(encoding))
        for name in ("a.csv", "a.jsonl", "a.json"):
            assert good(stream(tmp_path / name, encoding=encoding)) == expected, (name, encoding)
    (tmp_path / "a.csv").write_text(TEXT.replace(",", "|"), encoding="utf-8")
    assert good(stream(tmp_path / "a.csv", delimiter="|")) == expected
    (tmp_path / "a.csv").write_text("a;b\nc;d\n")
    assert len(good(stream(tmp_path / "a.csv", delimiter=";", column_names=["query", "positive"]))) == 2
    with pytest.raises(DataError, match="set delimiter=';'"):
        load_source(Source(path=str(tmp_path / "a.csv"), column_names=["query", "positive"]), "text-pair")
    (tmp_path / "a.csv").write_bytes(TEXT.encode("cp1252"))
    with pytest.raises(ValueError, match=r"1 not UTF-8\), such as a.csv:2: in query: 'f\\udcfcr'; set encoding"):
        load_source(str(tmp_path / "a.csv"), "text-pair")
    with pytest.raises(DataError, match="not utf-16"):
        stream(tmp_path / "a.csv", encoding="utf-16")


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("delimiter=;", "delimiter", ";"), ("delimiter='|'", "delimiter", "|"), ("delimiter=|", "delimiter", "|"),
        ("delimiter=\\t", "delimiter", "\t"), ("delimiter=tab", "delimiter", "\t"), ("quoting=none", "quoting", "none"),
        ("quoting=3", "quoting", "none"), ("quoting=QUOTE_ALL", "quoting", "all"),
    ],
)  # fmt: skip
def test_the_settings_as_they_are_typed(given, key, value):
    assert getattr(parse_source("a.csv", [given]), key) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("delimiter=;;", "must be one character"), ("quoting=some", "'quoting=some'"),
        ("encoding=utf-61", "'utf-61' is not an encoding that Python knows"), ("encoding=base64", "not an encoding"),
        ("column_mapping={", "is not valid YAML"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(given, message):
    with pytest.raises(RecipeError, match=message):
        parse_source("a.csv", [given])


def test_a_setting_that_a_format_does_not_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(DataError, match="is read as jsonl, but delimiter is for CSV and TSV files; remove it"):
        stream(tmp_path / "a.jsonl", delimiter=";")


# JSON


def test_json_lines_that_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"query": "a", "positive": "b"}\r{"query": "c", "positive": "d", "x": NaN}\r\nno json\n3\n"text"\nnull\n'
        b'{"query": "first", "query": "last", "positive": "p"}\n{"query": "cut", "positi'
    )
    found = stream(path)
    assert [row["query"] for row in good(found)] == ["a", "c", "last"], "of equal keys the last, as json has it"
    assert row_errors(found) == dict.fromkeys([f"a.jsonl:{n}" for n in (3, 4, 5, 6, 8)], "broken JSON")
    rows = list(found.read(str(path), None))
    for number, row in enumerate(rows):
        assert plain(found.read(str(path), row.position)) == plain(rows[number + 1 :])


def test_a_line_that_is_too_long_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("bifocal.data.text_files.LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl"
    good_line = '{"query": "a", "positive": "b"}\n'
    path.write_text(good_line + json.dumps({"query": "x" * 950, "positive": "b"}) + "\n" + good_line)
    found = stream(path)
    assert len(good(found)) == 2
    assert row_errors(found) == {"a.jsonl:2": "line too long"}
    rows = list(found.read(str(path), None))
    assert list(found.read(str(path), rows[1].position)) == rows[2:]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_arrays(tmp_path, name, monkeypatch):
    """In pieces of a few characters; with NaN, with a byte order mark, in a .jsonl file, and broken in several ways."""
    rows = [
        {"query": f"q {n} ü {'[{' * (n % 3)}", "positive": 'p\\"' * (n % 4 + 1), "x": [n, {"y": -1.5e3}], "z": None}
        for n in range(40)
    ]
    whole = json.dumps(rows, indent=1 if name == "a.json" else None).replace("null", "NaN")
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + whole.encode())
    expected = [{"query": row["query"].strip(), "positive": row["positive"]} for row in rows]
    for chunk in (7, 64, 2**18):
        monkeypatch.setattr("bifocal.data.text_files._CHUNK", chunk)
        found = stream(path)
        assert good(found) == expected
        assert not row_errors(found)
    read_rows = list(found.read(str(path), None))
    assert list(found.read(str(path), read_rows[9].position)) == read_rows[10:]
    for cut in (whole[:-1], whole[: len(whole) // 2], whole + "{}", whole.replace(",", "", 1), whole[:-1] + ", ]"):
        path.write_text(cut)
        found = stream(path)
        assert good(found) == expected[: len(good(found))]
        assert list(row_errors(found).values()) == ["file breaks off"], cut[-40:]
    path.write_text('[{"query": "a", "positive": "b"}, 3, "x"]')
    assert row_errors(stream(path)) == {f"{name}:2": "broken JSON", f"{name}:3": "broken JSON"}
