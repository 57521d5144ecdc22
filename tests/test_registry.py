import pytest

from lib.errors import RunError
from lib.registry import Registry


def test_a_name_is_taken_once_and_an_unknown_one_lists_what_exists():
    registry = Registry("--prune_method")
    registry.add("wanda", 1)
    registry.add("magnitude", 2)
    assert registry["wanda"] == 1
    assert list(registry) == ["wanda", "magnitude"]
    with pytest.raises(ValueError, match="already registered"):
        registry.add("wanda", 3)
    with pytest.raises(RunError, match=r"--prune_method: 'wnda'.*did you mean 'wanda'.*wanda, magnitude"):
        registry["wnda"]
