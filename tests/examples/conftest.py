import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Each test reads its rows itself, not from the cache of the person who runs it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
