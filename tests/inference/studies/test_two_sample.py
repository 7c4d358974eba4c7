import pytest
import torch

from probattn.errors import InputError
from probattn.inference.studies.two_sample import holm, two_sample_test


def normal(seed, count, dim=2, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def test_statistics_by_their_definitions():
    x, y = normal(0, 7), normal(1, 5, shift=0.5)
    found = two_sample_test(x, y, permutations=9)
    between, within = torch.cdist(x, y).mean(), torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    assert found.energy == pytest.approx(float(2 * between - within))
    pooled = torch.cdist(torch.cat([x, y]), torch.cat([x, y]))
    width = pooled[pooled > 0].median()

    def kernel(a, b):
        return torch.exp(-0.5 * (torch.cdist(a, b) / width) ** 2).mean()

    assert found.mmd == pytest.approx(float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


@pytest.mark.parametrize("other", [{"shift": 0.5}, {"scale": 1.6}], ids=["shifted", "wider"])
def test_different_laws_are_told_apart(other):
    found = two_sample_test(normal(0, 200), normal(1, 200, **other))
    assert max(found.energy_p, found.mmd_p) <= 0.01


def test_p_values_of_equal_laws_are_uniform():
    found = [two_sample_test(normal(2 * k, 40), normal(2 * k + 1, 30), permutations=199, seed=k) for k in range(200)]
    for name in ("energy_p", "mmd_p"):
        p = torch.tensor([getattr(test, name) for test in found]).double().sort()[0]
        gap = (p - (torch.arange(200) + 0.5) / 200).abs().max()
        assert gap < 1.63 / 200**0.5  # Kolmogorov's bound at 1 %


def test_holm():
    assert holm([0.2]) == [0.2]
    assert holm([0.5, 0.001, 0.02]) == pytest.approx([0.5, 0.003, 0.04])


def test_bad_input():
    with pytest.raises(InputError, match=r"got \(3, 2\) and \(3, 1\)"):
        two_sample_test(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(InputError, match="x"):
        two_sample_test(torch.full((3, 1), float("nan")), torch.zeros(3, 1))
