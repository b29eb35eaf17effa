"""The mutants fit the code as it is: one whose text is no longer there says nothing of the tests."""

import pytest

from tests.mutation.mutants import MUTANTS
from tests.test_house import ROOT


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_changes_one_place(file):
    text = (ROOT / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            changed, times = mutant.change(text)
            assert times == 1 and changed != text, mutant.name
            assert all((ROOT / test).is_file() for test in mutant.tests), mutant.name
