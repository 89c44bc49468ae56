"""Energy and emissions by codecarbon, with a stand-in of its offline tracker."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from hfprune.report.emissions import emissions


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that says what `found` holds; `calls` are what it was asked."""

    class OfflineEmissionsTracker:
        calls = []
        found = {"energy_consumed": 0.002, "emissions": 0.0007, "country_name": "France"}

        def __init__(self, **settings):
            self.calls.append(settings)

        def start(self):
            self.calls.append("start")

        def stop(self):
            self.calls.append("stop")
            if self.found:
                self.final_emissions_data = SimpleNamespace(**self.found)

    module = ModuleType("codecarbon")
    module.OfflineEmissionsTracker = OfflineEmissionsTracker
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    return OfflineEmissionsTracker


def test_energy_and_emissions_are_those_of_the_block(tracker):
    with emissions() as found:
        assert found == {} and tracker.calls[-1] == "start"
    assert found["co2_grams"] == pytest.approx(0.7) and found["location"] == "France"
    assert found["energy_kwh"] == 0.002 and found["source"].startswith("codecarbon")
    settings = tracker.calls[0]
    assert settings["save_to_file"] is settings["save_to_api"] is False and not settings["electricitymaps_api_token"]


def test_without_a_country_there_are_no_emissions(tracker):
    tracker.found = {"energy_consumed": 0.002, "emissions": 0.0009, "country_name": None}
    with emissions() as found:
        pass
    assert set(found) == {"energy_kwh", "source"}


@pytest.mark.parametrize("found", [None, {"energy_consumed": 0.0, "emissions": 0.0, "country_name": "France"}])
def test_what_the_tracker_could_not_find_out_is_not_said(tracker, found):
    tracker.found = found
    with emissions() as said:
        pass
    assert said == {}


def test_an_interrupted_block_stops_the_tracker(tracker):
    with pytest.raises(KeyboardInterrupt), emissions():
        raise KeyboardInterrupt
    assert tracker.calls[-1] == "stop"


def test_nothing_is_followed_without_codecarbon_or_where_another_process_does(tracker, monkeypatch):
    with emissions(follow=False) as found:
        pass
    assert found == {} and tracker.calls == []
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with emissions() as found:
        pass
    assert found == {}
