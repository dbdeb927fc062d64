import numpy as np

from fastvit_engine.data.pixels.draws import sample_seeds, uniforms


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


def test_sample_seeds_differ_by_every_number_of_the_address():
    seed, *address = np.indices((4, 3, 5, 7)).reshape(4, -1)
    seeds = np.concatenate([sample_seeds(s, *(numbers[seed == s] for numbers in address)) for s in range(4)])
    assert seeds.dtype == np.int64 and len(np.unique(seeds)) == 4 * 3 * 5 * 7
    assert sample_seeds(2**64 + 3, 1, 2) == sample_seeds(3, 1, 2) != sample_seeds(3, 2, 1)


def test_sample_seeds_are_those_that_runs_were_started_with():
    """A run that goes on with a later version must crop as it would have."""
    seeds = sample_seeds(7, np.array([0, 1]), 5, np.array([10**9, 0]))
    assert seeds.tolist() == [-4261765882560133409, -6976473609518325092]
    assert uniforms(seeds[:1], 2, stream=2000).tolist() == [[0.6712784635102211, 0.8111165238574697]]
