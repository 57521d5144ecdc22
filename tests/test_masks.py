import pytest
import torch

from lib.errors import RunError
from lib.masks import LowestOfMatrix, Pattern, lowest, lowest_of_groups, lowest_of_matrix, lowest_of_rows


def test_two_of_four_keeps_the_largest_two():
    assert lowest_of_groups(torch.tensor([[1.0, 2, 3, 4]]), 2, 4).tolist() == [[True, True, False, False]]


def test_lowest_takes_the_exact_count_of_each_row_also_among_equals():
    scores = torch.tensor([[2.0, 1, 1, 1], [0, 0, 0, 0], [4, 3, 2, 1]])
    expected = [[False, True, True, False], [True, True, False, False], [False, False, True, True]]
    assert lowest(scores, 2).tolist() == expected
    assert lowest(scores, torch.tensor([0, 4, 1])).tolist() == [[False] * 4, [True] * 4, [False, False, False, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("select", [lowest_of_matrix, lowest_of_rows])
def test_the_matrix_meets_its_sparsity_to_one_weight(select, sparsity):
    torch.manual_seed(0)
    scores = torch.randn(13, 17).abs()
    assert int(select(scores, sparsity).sum()) == round(sparsity * 13 * 17)


def test_whole_matrix_selection_is_a_threshold():
    torch.manual_seed(0)
    scores = torch.rand(8, 9)
    mask = lowest_of_matrix(scores, 0.4)
    assert scores[mask].max() < scores[~mask].min()


def test_row_selection_is_floor_then_one_more_where_it_costs_least():
    scores = torch.tensor([[1.0, 5, 9, 9], [1.0, 2, 9, 9]])
    # 0.375 of 8 is 3: one from each row, and the third from the row whose second lowest is the lower.
    assert lowest_of_rows(scores, 0.375).tolist() == [[True, False, False, False], [True, True, False, False]]
    torch.manual_seed(0)
    scores = torch.rand(64, 576)
    counts = lowest_of_rows(scores, 0.4322).sum(1)
    assert set(counts.tolist()) == {248, 249}  # 0.4322 * 576 = 248.9


def test_pattern_parse():
    assert Pattern.parse("unstructured") == (Pattern(None), None)
    assert Pattern.parse("2:4") == (Pattern(4), 0.5)
    assert Pattern.parse("3:8") == (Pattern(8), 0.375)
    assert Pattern(8).zeros(0.375) == 3


@pytest.mark.parametrize("text", ["", "2/4", "4:4", "0:4", "5:4", "a:b", "-1:4", "2:4:8", "structured"])
def test_pattern_refuses(text):
    with pytest.raises(RunError, match="--sparsity_type"):
        Pattern.parse(text)


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.7, 1.0])
def test_again_and_again_is_the_same_as_anew(sparsity, drift):
    generator, again = torch.Generator().manual_seed(0), LowestOfMatrix()
    scores = torch.rand(20, 30, generator=generator)
    for _ in range(5):
        scores = (scores + drift * torch.randn(20, 30, generator=generator)).abs()
        scores[3] = scores[4]  # ties
        assert torch.equal(again(scores, sparsity), lowest_of_matrix(scores, sparsity))
