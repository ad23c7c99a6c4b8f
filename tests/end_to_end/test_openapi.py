"""The OpenAPI document is true: whatever may be asked by it is answered as it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SEED = "20240229"
# It calls for a 2xx wherever a request fits the schema; but no schema knows which tokenizer is loaded, nor, with it,
# which Semantic IDs there are.
UNKNOWABLE = "positive_data_acceptance"


def fuzz(directory: Path, location: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run of schemathesis with all its checks and a fixed seed."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", location, "--checks", "all", "--seed", SEED]
    command += ["--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--warnings", "off", "--no-color"]
    hooks = {"SCHEMATHESIS_HOOKS": "fuzzed_bodies", "PYTHONPATH": str(Path(__file__).parent)}
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **hooks}
    return subprocess.run(
        [*command, *options], cwd=directory, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def assert_nothing_found(run: subprocess.CompletedProcess[str], service: Any) -> None:
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "No issues found" in run.stdout
    assert 'status="5' not in service.http.get("/metrics").text
    assert service.http.get("/readyz").status_code == 200
    assert "Traceback" not in service.log


def test_no_request_is_answered_otherwise_than_documented(running: Any, tmp_path: Path) -> None:
    location = f"{running.http.base_url}/openapi.json"

    run = fuzz(tmp_path, location, "--exclude-checks", UNKNOWABLE, "--max-examples", "100")

    assert_nothing_found(run, running)


@pytest.mark.parametrize("path", ["/tokenize", "/lookup"])
def test_every_request_that_fits_the_schema_is_taken(running: Any, tmp_path: Path, path: str) -> None:
    # Without "anything else", which a fuzzer would rather send than an item; and with the tokenizer that is loaded.
    document = running.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for envelope, member in (("TokenizeRequest", "items"), ("LookupRequest", "semantic_ids")):
        alternatives = schemas[envelope]["properties"][member]["items"]["anyOf"]
        alternatives.remove(next(entry for entry in alternatives if entry["title"] == "Anything else"))
        schemas[envelope]["properties"][member]["maxItems"] = 8
        if member == "items":
            bodies = document["paths"]["/tokenize"]["post"]["requestBody"]["content"]
            bodies["application/x-ndjson"]["schema"] = schemas[envelope]["properties"][member]
            del bodies["application/vnd.apache.arrow.stream"]
        schemas[envelope]["properties"]["tokenizer"] = {"const": running.http.get("/tokenizers").json()["default"]}
    for parameter in document["paths"]["/tokenize"]["post"]["parameters"]:
        if parameter["name"] == "tokenizer":
            parameter["schema"] = {"const": running.http.get("/tokenizers").json()["default"]}
    location = tmp_path / "openapi.json"
    location.write_text(json.dumps(document))
    rows = running.metric("semid_batch_rows_sum")

    run = fuzz(
        *(tmp_path, str(location), "--url", str(running.http.base_url), "--include-path", path),
        *("--mode", "positive", "--max-examples", "100"),
    )

    assert_nothing_found(run, running)
    assert path != "/tokenize" or running.metric("semid_batch_rows_sum") > rows + 20
