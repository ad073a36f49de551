"""Importing without looking for garbage."""

from __future__ import annotations

import gc

import pytest

from actors.imports import importing


def test_what_is_imported_is_not_looked_through_and_what_comes_after_is() -> None:
    imported, later = list[list[int]](), list[list[int]]()
    with importing():
        assert not gc.isenabled()
        imported.append([])
    later.append([])
    known = [id(each) for each in gc.get_objects()]
    assert gc.isenabled() and id(later[0]) in known and id(imported[0]) not in known
    gc.unfreeze()


def test_what_cannot_be_imported_changes_nothing() -> None:
    with pytest.raises(ImportError), importing():
        import no_such_module  # type: ignore[import-not-found] # noqa: F401
    assert gc.isenabled()
    gc.unfreeze()
