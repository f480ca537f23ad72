import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Rows are read anew in each test, not from the cache of whoever runs it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
