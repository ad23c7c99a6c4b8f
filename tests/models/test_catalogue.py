from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from models.catalogue import has_embeddings, read_items
from models.embedding_files import read_embeddings
from models.template import TextTemplate

ROWS = [
    {"item_id": "a1", "title": "Red lipstick", "brand": "Rouge", "category": "Beauty > Lips", "description": ""},
    {"item_id": "a2", "title": 'A "quoted", comma title', "brand": "", "category": "Café", "description": "two\nlines"},
    {"item_id": "a3", "title": "", "brand": "", "category": "", "description": ""},
]
TEXTS = ["Red lipstick. Rouge. Beauty > Lips", 'A "quoted", comma title. Café. two\nlines', ""]


@pytest.fixture(params=["parquet", "jsonl", "ndjson", "csv"])
def catalogue(request, tmp_path):
    """The same three rows in every format."""
    path = tmp_path / f"items.{request.param}"
    write(path, ROWS)
    return path


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_every_format_yields_the_same_items(catalogue):
    items = [item for batch in read_items(catalogue) for item in batch]
    assert [item.item_id for item in items] == ["a1", "a2", "a3"]
    assert [item.content(TextTemplate()) for item in items] == TEXTS
    assert items[0].fields == {"title": "Red lipstick", "brand": "Rouge", "categories": "Beauty > Lips"}


def test_rows_come_in_batches(catalogue):
    assert [len(batch) for batch in read_items(catalogue, batch_rows=2)] == [2, 1]


def test_other_columns_are_handed_on(tmp_path):
    path = tmp_path / "items.jsonl"
    write(path, [{"item_id": 7, "title": "t", "source": "shop"}, {"item_id": "8", "title": "u", "source": None}])
    items = [item for batch in read_items(path, keep=["source", "absent"]) for item in batch]
    assert [dict(item.kept) for item in items] == [{"source": "shop", "absent": ""}, {"source": "", "absent": ""}]
    assert items[0].item_id == "7"


def test_a_category_may_be_a_list_and_a_text_goes_before_the_fields(tmp_path):
    path = tmp_path / "items.parquet"
    write(path, [{"item_id": "a", "title": "t", "categories": ["x", "y"], "text": None}])
    (item,) = next(read_items(path))
    assert item.content(TextTemplate()) == "t. x > y"
    write(path, [{"item_id": "a", "title": "t", "text": " ready "}])
    (item,) = next(read_items(path))
    assert item.content(TextTemplate()) == "ready"


def test_columns_may_have_other_names(tmp_path):
    path = tmp_path / "items.csv"
    write(path, [{"sku": "9", "name": "Bolt"}])
    (item,) = next(read_items(path, columns={"item_id": "sku", "title": "name"}))
    assert (item.item_id, item.fields) == ("9", {"title": "Bolt"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.csv", "id,title\n1,x\n", "has no 'item_id'; its columns are"),
        ("items.csv", "item_id,price\n1,2\n", "has none of the columns"),
        ("items.csv", "item_id,title\n1,x,y\n", "row 1 has more cells"),
        ("items.jsonl", '{"item_id": "1", "title": "x"}\n{nonsense\n', "line 2 is not JSON"),
        ("items.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("items.jsonl", '{"item_id": "1", "title": {"en": "x"}}\n', "row 1, title: expected a string"),
        ("items.jsonl", '{"item_id": "1", "text": 3}\n', "row 1, text: expected a string"),
        ("items.jsonl", '{"item_id": 1.5, "title": "x"}\n', "row 1, item_id: expected a string or an integer, got 1.5"),
        ("items.jsonl", '{"item_id": NaN, "title": "x"}\n', "row 1 has no 'item_id'"),
        ("items.parquet", "no parquet", "cannot be read as Parquet"),
        ("items.xlsx", "", "is no catalogue"),
    ],
)
def test_a_faulty_file_is_refused_with_the_place(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(read_items(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        list(read_items(tmp_path / "items.csv"))


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n1,x\n", encoding="utf-8-sig")
    assert next(read_items(path))[0].item_id == "1"


@pytest.fixture(params=["npy", "safetensors", "parquet"])
def array(request, tmp_path):
    """A function that writes embeddings in one of the formats."""
    path = tmp_path / f"embeddings.{request.param}"

    def write_array(values):
        if path.suffix == ".npy":
            np.save(path, values)
        elif path.suffix == ".safetensors":
            save_file({"embeddings": torch.from_numpy(values)}, path)
        else:
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            pq.write_table(pa.table({"item_id": [str(row) for row in range(len(values))], "embedding": column}), path)
        return path

    return write_array


def test_every_format_yields_the_same_embeddings(array):
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    path = array(values)
    assert has_embeddings(path)
    assert np.array_equal(read_embeddings(path).numpy(), values)


def test_embeddings_that_are_not_finite_are_refused_with_the_row(array):
    values = np.ones((5, 3), np.float32)
    values[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite in 1 rows, the first of them row 3"):
        read_embeddings(array(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(3, np.float32), "expected"),
        (np.ones((2, 3, 4), np.float32), "expected"),
        (np.ones((0, 3), np.float32), "expected"),
        (np.ones((2, 3), np.int64), "expected floats"),
        (np.array([["a", {}]], dtype=object), "cannot be read as an array"),
    ],
)
def test_what_is_no_array_of_embeddings_is_refused(values, message, tmp_path):
    path = tmp_path / "embeddings.npy"
    np.save(path, values, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_embeddings(path)


def test_a_parquet_file_with_texts_is_a_catalogue(tmp_path):
    path = tmp_path / "items.parquet"
    write(path, ROWS)
    assert not has_embeddings(path)
    with pytest.raises(ValueError, match="no column 'embedding'"):
        read_embeddings(path)


def test_lists_of_varying_length_are_refused(tmp_path):
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [3.0]]}), path)
    with pytest.raises(ValueError, match="fixed-size lists"):
        read_embeddings(path)


def test_a_template_leaves_out_what_is_empty():
    template = TextTemplate()
    assert template.render({"title": " t ", "brand": None, "categories": ["a", "", " b "], "other": "x"}) == "t. a > b"
    assert template.render({}) == ""
    assert TextTemplate(fields=("brand", "title"), separator=" | ").render({"title": "t", "brand": "b"}) == "b | t"


@pytest.mark.parametrize(
    "row",
    [{"title": "a\ud800"}, {"title": "a", "category": ["b", "\udc00"]}, {"text": "\ud83d"}, {"item_id": "\ud800"}],
)
def test_half_a_surrogate_pair_is_refused_naming_file_and_row(row, tmp_path):
    path = tmp_path / "items.jsonl"
    write(path, [{"item_id": "a", "title": "fine 🎧"}, {"item_id": "b", "title": "t", **row}])
    with pytest.raises(ValueError, match=r"items\.jsonl, row 2 has half a surrogate pair"):
        list(read_items(path))


def test_a_line_without_content_is_an_item_without_content_unless_it_is_the_first(tmp_path):
    path = tmp_path / "items.jsonl"
    write(path, [{"item_id": "a", "title": "t"}, {"item_id": "b"}])
    (items,) = read_items(path)
    assert [item.content(TextTemplate()) for item in items] == ["t", ""]

    write(path, [{"item_id": "b"}, {"item_id": "a", "title": "t"}])
    with pytest.raises(ValueError, match="row 1 has none of the columns"):
        list(read_items(path))


def test_a_number_that_is_none_is_absent(tmp_path):
    path = tmp_path / "items.jsonl"
    write(path, [{"item_id": "a", "title": "t", "brand": float("nan"), "description": 5}])
    ((item,),) = read_items(path)
    assert item.fields == {"title": "t", "description": "5"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.csv", "item_id,title\n1,caf\xe9\n".encode("latin-1"), "latin.csv is not UTF-8"),
        ("wide.csv", b"item_id,title\n1," + b"x" * 200_000, "wide.csv, row 1 cannot be read: field larger"),
        ("open.csv", b'item_id,title\n1,a\n2,"b\n3,c\n', "open.csv, row 2 cannot be read: unexpected end"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl, line 1 is not JSON"),
        ("utf16.jsonl", '{"item_id": "1"}'.encode("utf-16"), "utf16.jsonl is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(read_items(tmp_path / name))


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = tmp_path / "items.parquet"
    ids = [str(number) for number in range(10_000)]
    pq.write_table(pa.table({"item_id": ids, "title": ids}), path)
    content = bytearray(path.read_bytes())
    content[200:400] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"items\.parquet cannot be read: "):
        list(read_items(path))


def test_item_ids_of_bytes_are_refused(tmp_path):
    pq.write_table(pa.table({"item_id": [b"ab"], "title": ["x"]}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"row 1, item_id: expected a string or an integer, got b'ab'"):
        list(read_items(tmp_path / "items.parquet"))


def test_an_empty_array_and_an_archive_are_refused(tmp_path):
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "archive.npz", np.zeros((2, 2)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name, words in (("empty", "cannot be read as an array"), ("archive", "it is an archive")):
        with pytest.raises(ValueError, match=words):
            read_embeddings(tmp_path / f"{name}.npy")
