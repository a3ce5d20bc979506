"""Optuna's own suite for storages, on the journal."""

from __future__ import annotations

import pickle

import optuna
import pytest
from optuna.testing.pytest_storages import StorageTestCase

from mixnas.search.study.journal import JournalFile


class TestJournalFile(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path):
        backend = JournalFile(tmp_path / "study.journal")
        yield optuna.storages.JournalStorage(backend)
        backend.close()

    def test_pickle_storage(self, storage):
        """Theirs pickles a storage and writes through both; a journal has one writer, which is why it is quick."""
        with pytest.raises(TypeError, match="has one writer and cannot be pickled"):
            pickle.dumps(storage)
