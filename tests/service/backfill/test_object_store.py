"""`semid backfill` from an object store into one, spoken to by its protocol on loopback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, S3FileSystem

from service.backfill import code_files, engines, sorting
from service.backfill.output import Table
from tests.service.backfill.catalogues import (
    ROWS_PER_RUN,
    interrupted,
    matrix_of,
    run,
    run_until_killed,
    table_of,
    write_embeddings,
)

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), sep=":", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto is not installed: semid[test]")


class Store:
    """A bucket.

    Attributes:
        options: What stands behind the URIs of its files.
    """

    def __init__(self, server: str) -> None:
        self.options = f"?scheme=http&endpoint_override={server}"
        self.files = S3FileSystem(scheme="http", endpoint_override=server, allow_bucket_creation=True)
        self.files.create_dir("shop")

    def uri(self, path: str) -> str:
        return f"s3://shop/{path}{self.options}"

    def put(self, file: Path, path: str) -> None:
        with self.files.open_output_stream(f"shop/{path}") as stream:
            stream.write(file.read_bytes())

    def names(self, directory: str) -> list[str]:
        selector = FileSelector(f"shop/{directory}", allow_not_found=True)
        return sorted(entry.base_name for entry in self.files.get_file_info(selector))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        address = next(line for line in map(bytes.decode, server.stdout) if line.startswith("127."))
        yield Store(address.strip())
        server.kill()


@pytest.mark.usefixtures("settings")
def test_a_table_in_an_object_store_is_that_of_a_directory_though_the_backfill_is_killed(
    store: Store, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "ROWS_PER_RUN", ROWS_PER_RUN)
    matrix = matrix_of(600)
    matrix[77] = 0.0
    for number in range(2):
        file = write_embeddings(tmp_path / f"{number}.parquet", matrix[300 * number :][:300], first=300 * number)
        store.put(file, f"items/{number}.parquet")
    run(tmp_path / "?.parquet", "--out", tmp_path / "here", "--workers", 1, "--block-rows", 200)

    monkeypatch.setenv("SID_DATA_DIR", str(data_dir / "another"))
    words = [store.uri("items/*.parquet"), "--block-rows", 200, "--workers", 1, "--journal", tmp_path / "journal"]
    words += ["--out", store.uri("ids")]
    run_until_killed("codes", 3, *words)
    with monkeypatch.context() as patched:
        write = Table.write
        patched.setattr(Table, "write", lambda table, block: write(table, block) if block.number < 2 else interrupted())
        assert run(*words).exit_code == 130
    monkeypatch.setattr(engines, "BlockEncoder", None)  # all blocks are encoded
    parts = store.names("ids")
    last, again = run(*words), run(*words)

    assert parts == ["part-000000.parquet", "part-000001.parquet"]
    assert (last.exit_code, again.exit_code) == (3, 3), last.output + again.output
    assert "nothing was done now" in again.output
    assert not list((tmp_path / "journal").iterdir())
    names = [f"part-{number:06}.parquet" for number in range(4)]
    assert store.names("ids") == ["backfill.json", *names, "rejected.jsonl"]
    with store.files.open_input_file("shop/ids/rejected.jsonl") as file:
        assert b'"item_id": "i77"' in file.read()
    there = pa.concat_tables([pq.read_table(f"shop/ids/{name}", filesystem=store.files) for name in names])
    assert there.equals(table_of(tmp_path / "here"))


@pytest.mark.usefixtures("settings")
def test_an_object_that_is_replaced_by_one_of_equal_size_is_noticed_and_a_table_among_the_items_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (write_embeddings(tmp_path / str(seed), matrix_of(60, seed=seed)) for seed in (5, 6))
    size = one.stat().st_size
    assert size == other.stat().st_size
    store.put(one, "items/a.parquet")
    write = code_files.write_arrow

    def replace_and_write(path: Path, rows: pa.Table) -> None:
        store.put(other, "items/a.parquet")
        write(path, rows)

    monkeypatch.setattr(code_files, "write_arrow", replace_and_write)
    words = [store.uri("items"), "--workers", 1, "--block-rows", 20, "--journal", tmp_path / "journal", "--out"]
    replaced, among = run(*words, store.uri("ids")), run(*words, store.uri("items/ids"))
    without_journal = run(store.uri("items"), "--out", store.uri("ids"))

    assert (replaced.exit_code, among.exit_code, without_journal.exit_code) == (1, 1, 1)
    assert "was changed or replaced after the backfill of it began" in replaced.output
    assert "name a directory apart from it by --out" in among.output
    assert "by --journal" in without_journal.output
