"""log p(x) through training: of the weights as they stand at its epochs, and disturbing nothing."""

import pytest
from training_helpers import binary_data, identical, small_vae

import pyro_vae as pv
from pyro_vae.errors import ConfigError
from pyro_vae.training import track_log_px
from pyro_vae.training.checkpoint import copy_weights


def test_log_px_of_a_fixed_subset_is_recorded_every_so_many_epochs() -> None:
    data, vae, weights = binary_data(), small_vae(), {}
    x = data.valid.fixed().x[:7]

    def keep(epoch: int) -> dict[str, float]:
        weights[epoch] = copy_weights(vae)
        return {}

    tracker = track_log_px(vae, x, every=2, num_samples=30, seed=5)
    run = pv.fit(vae, data, epochs=5, batch_size=16, trackers=[tracker, keep], progress=False)
    recorded = {row["epoch"]: row for row in run.metrics if "valid_log_px" in row}
    assert sorted(recorded) == [2, 4]
    for epoch, row in recorded.items():
        vae.load_state_dict(weights[epoch])
        found = pv.log_marginal(vae.model, vae.guide, x, num_samples=30, seed=5)
        assert row["valid_log_px"] == pytest.approx(found.mean, abs=1e-9)
        assert row["valid_log_px_se"] == pytest.approx(found.se_mc, abs=1e-9)


def test_training_is_the_same_beside_a_tracker() -> None:
    """Dropout would draw other masks if the generator or the mode were disturbed."""
    trained = []
    for watched in (False, True):
        vae, data = small_vae(dropout=0.3), binary_data(dynamic=True)
        trackers = [track_log_px(vae, data.valid, every=1, num_samples=5)] if watched else []
        pv.fit(vae, data, epochs=3, batch_size=16, trackers=trackers, progress=False)
        trained.append(vae)
    assert identical(*trained)


def test_options_of_a_tracker_are_checked_before_training() -> None:
    data, vae = binary_data(), small_vae()
    for option in ({"every": 0}, {"every": 1.5}, {"num_samples": 0}, {"num_samples": "5"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            track_log_px(vae, data.valid, **option)
