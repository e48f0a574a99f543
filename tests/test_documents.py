"""Documents of users: every format is read, what is malformed is skipped and named."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pypdf
import pytest
from small import small_tokenizer

from hf_effattn.evaluation import documents
from hf_effattn.evaluation.documents import Skipped, read_rows, read_text
from hf_effattn.evaluation.material import Sources

PAGE = b"""<!doctype html><html><head><title>tab</title><style>p {}</style></head><body>
<!-- a comment --><h1>Head<i>ing</i></h1><p>one
  line &amp; <b>more</b></p><script>var x = 1;</script><p hidden>unseen</p>
<pre>  kept
    code</pre><table><tr><td>a</td><td>b</td></tr></table>x<br>y</body></html>"""


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page, written by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        page = f"/Parent 2 0 R /Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * i} 0 R"
        objects.append(f"<< /Type /Page {page} /MediaBox [0 0 612 792] >>")
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}"
    return data + end.encode() + b"\n%%EOF"


def locked(password: str) -> bytes:
    writer, buffer = pypdf.PdfWriter(io.BytesIO(pdf("secret"))), io.BytesIO()
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(buffer)
    return buffer.getvalue()


def written(path: Path, content: Any) -> Path:
    """Write bytes as they are, and a list as JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "naïve\n".encode(), "naïve\n"),
        ("a.md", b"\xef\xbb\xbf# with a mark", "# with a mark"),
        ("a.RST", b"one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("noname", b"x", "x"),
        ("a.html", PAGE, "Heading\none line & more\n  kept\n    code\na b\nx\ny"),
        ("a.htm", '<meta charset="latin-1"><p>naïve'.encode("latin-1"), "naïve"),
        ("a.pdf", pdf("First page.", "Second page."), "First page.\nSecond page."),
        ("open.pdf", locked(""), "secret"),
    ],
)
def test_every_format_of_text(name: str, data: bytes, text: str, gz: str, tmp_path: Path) -> None:
    path = written(tmp_path / (name + gz), data)
    assert read_text(path) == read_text(str(path)) == text
    assert read_rows(path).rows == [{"document": text, "question": "", "answers": [], "id": name + gz}]


def test_control_characters_become_spaces_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "a.txt", "a\x0cb\x1b[0m\tc\x7f\x85\n".encode())
    assert read_text(path) == "a b [0m\tc  \n"
    assert f"{path}: 4 control characters" in caplog.text
    read = read_rows(path)
    assert (read.replaced, read.altered) == (4, [f"{path}, line 1"])
    assert f"{path}: 4 control characters replaced by spaces, first in {path}, line 1" in caplog.text
    page = written(tmp_path / "a.html", b"<p>one\n\n<p>two\x01")
    assert read_rows(page).altered == [str(page)]
    rows = [{"document": "a\0b", "question": "\ud800?", "answers": "\x01c"}]
    path = written(tmp_path / "a.jsonl", rows)
    read = read_rows(path)
    assert read.altered == [f"{path}, line 1"]
    assert (read.rows, read.replaced) == ([{"document": "a b", "question": " ?", "answers": [" c"]}], 3)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nnot \xff", r"byte 9 \(line 2\) is not UTF-8"),
        ("a.txt", "naïve".encode("utf-16"), "byte 3 is zero: a binary file"),
        ("a.docx", b"PK\x03\x04\0\0", "byte 4 is zero"),
        ("a.txt", b"", "the document is empty"),
        ("a.txt", b" \n\t\x0c", "the document is empty"),
        ("a.html", b"<title>only</title><script>x</script>", "the document is empty"),
        ("a.html", b'<meta charset="klingon">x', "'klingon', which is no known encoding"),
        ("a.pdf", pdf("", ""), "no text in the 2 pages"),
        ("a.pdf", locked("password"), "encrypted"),
        ("a.pdf", b"not one", "the PDF can't be read"),
        ("a.pdf", b"", "the PDF can't be read"),
    ],
)
def test_texts_that_cannot_be_read_are_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, data)
    for read in (read_text, read_rows):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            read(path)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 40}).encode() + b"\n" for i in range(5000)))
    for data in (b"no archive", whole[: len(whole) // 2]):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.txt\.gz: "):
            read_text(path)
        path = path.rename(tmp_path / "a.jsonl.gz")
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: the file is damaged behind line \d+"):
            read_rows(path)


@pytest.mark.parametrize(
    ("name", "package", "module"), [("a.pdf", "pypdf", "pypdf"), ("a.htm", "beautifulsoup4", "bs4")]
)
def test_what_to_install(name: str, package: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'hf_effattn\[eval\]'"):
        read_text(written(tmp_path / name, b"x"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_rows_may_name_their_fields_in_several_ways(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"document": "d", "question": "q", "answers": ["a", "b"], "id": 7, "more": [1]},
        {"text": "d", "answer": "a"},
        {"context": "d", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}, "id": "x"},
        {"report": "d", "summary": "a", "question": None, "answers": None},
        {"document": None, "text": "d", "answers": []},
    ]
    assert read_rows(written(tmp_path / name, rows)).rows == [
        {"document": "d", "question": "q", "answers": ["a", "b"], "id": "7"},
        {"document": "d", "question": "", "answers": ["a"]},
        {"document": "d", "question": "q", "answers": ["a"], "id": "x"},
        {"document": "d", "question": "", "answers": ["a"]},
        {"document": "d", "question": "", "answers": []},
    ]


MALFORMED = [
    (b'{"document": "d"', "not JSON: .* at character 17"),
    (b"not JSON", "not JSON: .* at character 1$"),
    (b"[" * 100_000, "not JSON that can be read"),
    (b'["document"]', r"not an object with fields but \['document'\]"),
    (b"null", "not an object with fields but None"),
    (b'{"question": "q", "answers": []}', "no document under document, text, .*; there is question, answers"),
    (b'{"document": ["d"]}', r"the document is not a text but \['d'\]"),
    (b'{"document": ""}', "the document is empty"),
    (b'{"document": " \\n\\u0000"}', "the document is empty"),
    (b'{"document": "d", "question": 0}', "the question is not a text but 0"),
    (b'{"document": "d", "answers": 42}', "the answers are not texts but 42"),
    (b'{"document": "d", "answers": ["a", null]}', r"the answers are not texts but \['a', None\]"),
    (b'{"document": "d", "answers": {"start": [1]}}', "the answers are not texts but {'start'"),
    (b'{"document": "d", "answers": ""}', "an answer is empty"),
    (b'{"document": "d", "answers": ["a", " "]}', "an answer is empty"),
    (b'{"document": "d\xff"}', "byte 15 of the line is not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_a_malformed_row_is_skipped_and_the_rest_goes_on(
    line: bytes, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = b'{"document": "first"}\n\n  \r\n'  # blank lines are nothing to tell about
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + good + line + b'\n{"document": "last"}')
    read = read_rows(path)
    assert [row["document"] for row in read.rows] == ["first", "last"]
    ((place, found),) = [(skipped.place, skipped.reason) for skipped in read.skipped]
    assert place == f"{path}, line 4"
    assert re.search(reason, found)
    assert [record.getMessage() for record in caplog.records] == [f"skipped {place}: {found}"]


def test_many_malformed_rows_get_a_summary_and_none_left_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": ""}] * 50 + [{"text": "d"}])
    read = read_rows(path)
    assert (len(read.rows), len(read.skipped)) == (1, 50)
    assert read.skipped[-1] == Skipped(f"{path}, line 50", "the document is empty")
    assert len(caplog.records) == documents.SHOWN + 1
    assert caplog.records[-1].getMessage() == f"{path}: 50 skipped in all, of which the first 20 were named"
    path = written(tmp_path / "b.jsonl", [{"text": ""}, {"text": 1}])
    with pytest.raises(ValueError, match=r"no usable row; 2 were skipped:\n.*line 1: the doc.*\n.*line 2: the doc"):
        read_rows(path)
    with pytest.raises(ValueError, match="no usable row; 0 were skipped$"):
        read_rows(written(tmp_path / "c.jsonl", b"\n"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"document": "d"}, {"document": "e"}], indent=1),
        '[{"document": "d"},\n{"document": "e"}]',
        '\n[{\n"document": "d"}]',
    ],
)
def test_json_over_several_lines_is_told_once(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "a.json", text.encode())
    with pytest.raises(ValueError, match=r"^[^\n]*a\.json: JSON over several lines; one object a line is expected$"):
        read_rows(path)
    written(tmp_path / "b.json", b"\xef\xbb\xbf" + json.dumps({"document": "d"}, indent=1).encode())
    written(tmp_path / "c.jsonl", b'["d"]\n{"document": "d"}\n')
    read = read_rows(tmp_path)
    assert len(read.rows) == 1
    assert [skipped.place for skipped in read.skipped] == [
        str(path),
        str(tmp_path / "b.json"),
        f"{tmp_path / 'c.jsonl'}, line 1",
    ]
    assert len(caplog.records) == 3


def test_one_is_told_in_the_singular(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no usable row; 1 was skipped:"):
        read_rows(written(tmp_path / "a.jsonl", b"null\n"))
    read_text(written(tmp_path / "a.txt", b"a\x01"))
    assert "a.txt: 1 control character replaced" in caplog.text
    with pytest.raises(ValueError, match="no text in the 1 page of the PDF"):
        read_text(written(tmp_path / "a.pdf", pdf("")))


def test_rows_know_where_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert read_rows(path).places == [f"{path}, line 1", f"{path}, line 3"]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "t", "body": "b", "query": "q", "gold": "g"}, {"text": "t"}])
    columns = {"document": "body", "question": "query", "answers": "gold"}
    read = read_rows(path, columns=columns)
    assert read.rows == [{"document": "b", "question": "q", "answers": ["g"]}]
    assert read.skipped == [Skipped(f"{path}, line 2", "no 'body'; there is text")]
    with pytest.raises(ValueError, match="unknown field 'query' in columns; valid: document, question, answers, id"):
        read_rows(path, columns={"query": "question"})


def test_documents_may_be_apart_from_the_questions(tmp_path: Path) -> None:
    rows = [{"doc_id": 1, "question": "q1"}, {"doc_id": "b", "question": "q2"}, {"question": "q3"}, {"doc_id": 1}]
    path = written(tmp_path / "a.jsonl", rows)
    texts = written(tmp_path / "docs.jsonl.gz", [{"doc_id": "1", "text": "one"}, {"doc_id": "b", "text": ""}])
    read = read_rows(path, documents=texts)
    assert [(row["document"], row["question"]) for row in read.rows] == [("one", "q1"), ("one", "")]
    assert [skipped.place for skipped in read.skipped] == [f"{texts}, line 2", f"{path}, line 2", f"{path}, line 3"]
    assert read.skipped[1].reason == "there is no document with the doc_id 'b'"
    written(texts, [{"doc_id": 1, "text": "one"}, {"doc_id": "1", "text": "two"}])
    with pytest.raises(ValueError, match="docs.jsonl.gz has two documents with the doc_id '1'"):
        read_rows(path, documents=texts)
    read = read_rows(written(path, [{"doc_id": "s/x.txt"}]), documents=written(tmp_path / "s/s/x.txt", b"X").parents[1])
    assert [row["document"] for row in read.rows] == ["X"]


def test_a_folder_is_read_in_order_with_all_that_is_in_it(tmp_path: Path) -> None:
    for name, data in {"b/2.txt": b"two", "b/1.html": b"<p>one", "c.pdf": pdf("three"), ".hidden/x.txt": b"x"}.items():
        written(tmp_path / name, data)
    written(tmp_path / "a.jsonl", [{"text": "zero", "id": "z"}, {"text": ""}])
    picture = written(tmp_path / "b/0.png", b"\x89PNG\r\n\0")
    archive = tmp_path / "d.jsonl.gz"
    archive.write_bytes(b"no archive")
    read = read_rows(tmp_path)
    expected = [("zero", "z"), ("one", "b/1.html"), ("two", "b/2.txt"), ("three", "c.pdf")]
    assert [(row["document"], row["id"]) for row in read.rows] == expected
    places = [skipped.place for skipped in read.skipped]
    assert places == [f"{tmp_path / 'a.jsonl'}, line 2", str(picture), str(archive)]
    assert read.skipped[1].reason == "byte 6 is zero: a binary file, or text that is not UTF-8"
    assert len(read_rows(tmp_path, limit=2).rows) == 2
    written(tmp_path / "t.csv", b"text\nfour\n")
    with pytest.raises(ValueError, match=r"has tables \(t.csv\) and other files \(.*\): read them one by one"):
        read_rows(tmp_path)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("# A data set")
    for split, texts in (("train", ["a", "", "b"]), ("test", ["c"])):
        rows = [
            {"context": t, "question": f"{t}?", "answers": {"text": [t or "x"], "answer_start": [0]}} for t in texts
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_read_by_their_library(tables: Path, streaming: bool) -> None:
    read = read_rows(tables, "train", streaming)
    assert [(row["document"], row["question"], row["answers"]) for row in read.rows] == [
        ("a", "a?", ["a"]),
        ("b", "b?", ["b"]),
    ]
    assert read.skipped == [Skipped(f"{tables}, row 2", "the document is empty")]
    assert len(read_rows(str(tables), "train", streaming, limit=1).rows) == 1
    assert [row["document"] for row in read_rows(tables / "test.parquet", streaming=streaming).rows] == ["c"]
    with pytest.raises(ValueError, match="has the splits (train, test|test, train); got split=None"):
        read_rows(tables, streaming=streaming)
    with pytest.raises(ValueError, match="(?i)split"):
        read_rows(tables, "dev", streaming)
    (tables / "train.parquet").unlink()
    assert [row["document"] for row in read_rows(tables, streaming=streaming).rows] == ["c"]


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a table of the kind that its name says."""
    path, data = folder / name, datasets.Dataset.from_list(rows)
    if path.suffix == ".arrow":
        data.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow")).rename(path)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    (data.to_parquet if path.suffix == ".parquet" else data.to_csv)(plain)
    return written(path, plain.read_bytes())


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet", "a.arrow"])
def test_a_table_given_as_a_text_is_read_by_its_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"number": 1, "text": "Once, there was."}, {"number": 2, "text": " "}, {"number": 3, "text": "x\nThe end."}]
    path = table(tmp_path, name, rows)
    other = written(tmp_path / "other.txt", b"Other.")
    material, skipped = Sources((str(path), str(other))).gather(small_tokenizer())
    assert material.text == "Once, there was.\n\nx\nThe end.\n\nOther."
    assert skipped == [Skipped(f"{path}, row 2", "the document is empty")]
    nameless = table(tmp_path, name, [{"number": 1, "words": "a"}])
    with pytest.raises(ValueError, match="row 1: no document under document, text, .*; there is number, words"):
        Sources((str(nameless),)).gather(small_tokenizer())


@pytest.mark.parametrize(
    ("name", "data"), [("a.csv", b'text\n"open'), ("a.csv", b""), ("a.parquet", b"x"), ("a.arrow", b"x" * 99)]
)
def test_tables_that_cannot_be_read_are_named(
    name: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path / name, data)
    with pytest.raises(ValueError, match=f"{name}: the table can't be read: ."):
        read_rows(path)


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": "a"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    for arguments in (("one",), ("two", "test")):
        assert [row["document"] for row in read_rows(tmp_path / arguments[0], *arguments[1:]).rows] == ["a"]
    for arguments in (("one", "test"), ("two",), ("two", "dev")):
        with pytest.raises(ValueError, match="has the splits"):
            read_rows(tmp_path / arguments[0], *arguments[1:])


@pytest.mark.parametrize("source", ["squad", "rajpurkar/squad", "allenai/some-data-v1.1"])
def test_what_may_be_on_the_hub_is_asked_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows(source, "dev", True, name="plain").rows) == 1
    assert asked == [((source, "plain"), {"split": "dev", "streaming": True})]


@pytest.mark.parametrize("source", ["a.jsonl", "data/a.txt", "a/b/c", "./a", "/a", "~/a", Path("a/b"), "a\\b"])
def test_files_that_are_missing_are_named(source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder {re.escape(str(source))}$"):
        read_rows(source)
    with pytest.raises(FileNotFoundError, match="a"):
        read_text(source)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"a\.jsonl is a file and has no splits; got split='train'"):
        read_rows(path, "train")
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        read_rows(path, limit=0)


def test_texts_that_cannot_be_read_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    good, bad = written(tmp_path / "good.txt", b"fine"), written(tmp_path / "bad.txt", b"fine\nnot \xff")
    rows = written(tmp_path / "rows.jsonl", [{"text": ""}])
    tokenizer = small_tokenizer()
    for order in ([good, bad, rows], [bad, rows, good]):
        material, skipped = Sources(tuple(map(str, order))).gather(tokenizer)
        assert material.text == "fine"
        assert skipped == [
            Skipped(str(bad), "byte 9 (line 2) is not UTF-8"),
            Skipped(str(rows), f"{rows} has no usable row; 1 was skipped: {rows}, line 1: the document is empty"),
        ]
    with pytest.raises(ValueError, match=r"bad\.txt: byte 9 \(line 2\) is not UTF-8\n.*rows\.jsonl has no usable row"):
        Sources((str(bad), str(rows))).gather(tokenizer)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        Sources((str(good), str(tmp_path / "gone.txt"))).gather(tokenizer)


def test_the_material_tells_of_control_characters(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", b"w1\nw2\x01\nw3\x02")
    rows = written(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": "w\x01"}, {"text": "\x02w"}])
    tokenizer = small_tokenizer()
    told = "had control characters, which became spaces; the first:"
    material, _ = Sources((str(text),), str(rows)).gather(tokenizer)
    assert list(material.notes) == [f"3 documents {told} {text}, line 2"]
    assert [row["place"] for row in material.documents] == [f"{rows}, line {line}" for line in (1, 2, 3)]
    assert list(Sources(documents=str(text)).gather(tokenizer)[0].notes) == [f"1 document {told} {text}, line 2"]
    assert not Sources().gather(tokenizer)[0].notes
