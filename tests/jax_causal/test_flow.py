"""Schedule, conversions and the time feature against the golden vectors and closed forms."""

import numpy as np
import pytest

from jax_causal import flow
from tests import golden_data

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=[5.0, 8.0], ids=["shift5", "shift8"])
def case(request):
    data = golden_data.load("scheduler")
    prefix = f"shift{request.param:.0f}/"
    return request.param, {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def test_tables(case):
    shift, data = case
    np.testing.assert_allclose(flow.sigmas(shift), data["sigmas"], rtol=1e-6)
    np.testing.assert_allclose(flow.timesteps(shift), data["timesteps"], rtol=1e-6)
    np.testing.assert_allclose(flow.training_weights(shift), data["training_weights"], atol=2e-5)


def test_warp(case):
    shift, data = case
    steps = [int(s) for s in data["warp_in"]]
    np.testing.assert_allclose(flow.warp(steps, shift), data["warp_out"], rtol=1e-6)


def test_conversions(case):
    shift, data = case
    sigma = flow.sigma_at(data["t"], shift)
    xt = flow.add_noise(data["x0"], data["noise"], sigma)
    np.testing.assert_allclose(xt, data["xt"], atol=2e-6)
    np.testing.assert_allclose(
        flow.x0_from_flow(data["xt"], data["flow"], sigma), data["x0_from_flow"], atol=2e-6
    )
    np.testing.assert_allclose(
        flow.flow_from_x0(data["xt"], data["x0"], sigma), data["flow_from_x0"], rtol=1e-5, atol=2e-5
    )
    np.testing.assert_allclose(
        flow.euler_step(data["xt"], data["flow"], data["t"], shift), data["euler_step"], atol=2e-6
    )
    np.testing.assert_allclose(flow.training_weight_at(data["t"], shift), data["weight_at_t"], atol=2e-5)


def test_time_zero_maps_to_the_last_entry():
    np.testing.assert_allclose(flow.sigma_at(0.0, 5.0), 0.00498008, atol=1e-8)


def test_time_sinusoid():
    data = golden_data.load("rope_time")
    expected = data["time_sinusoid256"]
    np.testing.assert_allclose(flow.time_sinusoid(data["time_t"], expected.shape[-1]), expected, atol=2e-6)


def test_time_sinusoid_at_random_times():
    t = np.random.default_rng(0).uniform(0, 1000, 5000).astype(np.float32)
    angle = np.outer(t.astype(np.float64), 10000.0 ** (-np.arange(64) / 64))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(flow.time_sinusoid(t, 128), expected, atol=1e-6)
