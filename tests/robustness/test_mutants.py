"""The wrong changes of `mutants.py`, which `mutate.py` makes, still fit the code."""

import ast
import shlex
from pathlib import Path

import pytest
from mutants import AREAS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("area", AREAS)
def test_each_wrong_change_has_one_place_and_is_python(area):
    assert len(AREAS[area]) >= 10
    for mutant in AREAS[area]:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, mutant
        changed = text.replace(mutant.old, mutant.new)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutant
        files = [word for word in shlex.split(mutant.tests) if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), mutant
