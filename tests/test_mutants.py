"""The mutation check itself takes minutes (`make mutants`); this keeps its list in step with the source."""

import pytest
from mutants import MUTANTS, source


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.module}, {mutant.name}")
def test_every_mutant_changes_one_place(mutant):
    assert source(mutant).count(mutant.old) == 1
    assert mutant.old != mutant.new
