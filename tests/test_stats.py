import pytest
import torch

from lib.stats import InputStats


@pytest.mark.parametrize("size", [5, 256, 300, 1100])
def test_gram_in_column_blocks_is_the_gram(size):
    x = torch.randn(2, 60, size)
    stats = InputStats("gram")
    stats.add(x[0])
    stats.add(x[1:])  # any leading shape
    stats.finish()
    flat = x.reshape(-1, size).double()
    assert stats.tokens == 120
    torch.testing.assert_close(stats.gram.double(), flat.T @ flat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.gram, stats.gram.T, rtol=0, atol=0)
    torch.testing.assert_close(stats.sum_squares.double(), flat.square().sum(0), rtol=1e-4, atol=1e-4)


def test_half_precision_inputs_are_summed_in_float32():
    x = torch.full((40000, 2), 0.1, dtype=torch.float16)
    stats = InputStats("diagonal")
    stats.add(x)
    assert stats.sum_squares.dtype == torch.float32
    assert float(stats.sum_squares[0]) == pytest.approx(40000 * float(x[0, 0]) ** 2, rel=1e-3)  # past float16's range


def test_nothing_needs_no_statistics():
    with pytest.raises(ValueError, match="needs"):
        InputStats("nothing")
