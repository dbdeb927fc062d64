import numpy as np

from fastvit_engine.data.draws import uniforms


def test_draws_depend_on_each_seed_alone():
    seeds = np.array([5, 2**62 + 3, 0, 5])
    together = uniforms(seeds, 6, stream=1)
    assert np.array_equal(together[0], together[3]) and together.shape == (4, 6)
    assert np.array_equal(together[1:2], uniforms(seeds[1:2], 6, stream=1))
    assert np.array_equal(together[:, :4], uniforms(seeds, 4, stream=1))
    assert not np.isin(together[:3], uniforms(seeds, 6, stream=2)).any()


def test_draws_are_uniform_and_independent():
    draws = uniforms(np.arange(20000), 2, stream=0)  # neighbouring seeds are the hardest
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram2d(draws[:, 0], draws[:, 1], bins=8, range=[[0, 1], [0, 1]])[0]
    expected = 20000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square of 63 degrees, beyond the 99.97th percentile
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
