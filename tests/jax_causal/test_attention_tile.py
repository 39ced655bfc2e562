"""The order in which the Hopper kernel copies keys and values is that in which they are multiplied."""

import pytest

from jax_causal.attention_tile import turn_of_keys, turn_of_values


@pytest.mark.parametrize("counts", [[1], [2], [5, 1, 3]])
def test_turns_follow_the_products(counts):
    """A step multiplies its keys, and then the values of the step before; the last values come alone."""
    found, done = {}, 0
    for tile, count in enumerate(counts):
        for step in range(count):
            found["keys", tile, step] = int(turn_of_keys(done, step))
            found["values", tile, step] = int(turn_of_values(done, step, count))
        done += count
    expected = []
    for tile, count in enumerate(counts):
        for step in range(count):
            expected += [("keys", tile, step)] + [("values", tile, step - 1)] * (step > 0)
        expected.append(("values", tile, count - 1))
    assert sorted(found, key=found.get) == expected
    assert sorted(found.values()) == list(range(len(expected)))
