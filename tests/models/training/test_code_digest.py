"""The digest is of the code that a fit runs, not of its words."""

from __future__ import annotations

import importlib
import sys

import pytest

from models.training.code_digest import code_digest

CODE = {
    "first": '"""Words."""\n\n\ndef double(x):\n    """Words."""\n    return 2 * x\n',
    "second": "from models.whole import first\n\nLIMIT = 3\n",
    "third": "LIMIT = 3\n",
}


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """The digest of a small package, some of whose modules are changed; `second` imports `first` and nothing else."""

    def digest(**changed):
        package = tmp_path / str(len(list(tmp_path.iterdir()))) / "whole"
        package.mkdir(parents=True)
        for name, text in {"__init__": "", **CODE, **changed}.items():
            (package / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys.modules["models"], "__path__", [str(package.parent)])
        monkeypatch.delitem(sys.modules, "models.whole", raising=False)
        code_digest.cache_clear()
        return code_digest(("models.whole.second",))

    yield digest
    code_digest.cache_clear()
    sys.modules.pop("models.whole", None)


def test_code_that_is_imported_counts_and_other_code_does_not(digest_of):
    before = digest_of()
    assert digest_of(first=CODE["first"].replace("2 * x", "3 * x")) != before
    assert digest_of(second=CODE["second"].replace("3", "4")) != before
    assert digest_of(third="LIMIT = 4\n") == before


def test_words_and_layout_do_not_count(digest_of):
    told = '"""Others."""\n\ndef double(x):\n    # Why not.\n    """And others."""\n\n    return (2 * x)\n'
    assert digest_of(first=told) == digest_of()


def test_the_fit_is_among_the_code_and_the_pages_are_not(monkeypatch):
    code_digest.cache_clear()
    parsed = []
    parse = code_digest.__wrapped__.__globals__["ast"].parse
    monkeypatch.setattr("models.training.code_digest.ast.parse", lambda text: parsed.append(text) or parse(text))
    code_digest()
    code_digest.cache_clear()
    texts = b"\n".join(parsed)
    assert b"class _Fitting" in texts  # models.training.fit
    assert b"def nearest_codeword" in texts  # models.quantizer, by way of others
    assert b"def training_page" not in texts
    assert b"class Trie" not in texts
