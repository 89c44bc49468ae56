"""Energy and emissions of a run, as codecarbon estimates them; nothing where it is not installed."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def emissions(follow: bool = True) -> Iterator[dict[str, Any]]:
    """Follows what the machine draws inside the block, with codecarbon's offline tracker.

    It asks no one on the network where the machine stands, and writes no file. The country is that of codecarbon's own
    settings (`CODECARBON_COUNTRY_ISO_CODE=FRA`, or `.codecarbon.config`); where they name none there is energy, and no
    emissions: codecarbon would take the mean of the world.

    Args:
        follow: whether to follow at all, as one process of several does for the whole machine.

    Yields:
        A dict that is empty until the block has ended; then `energy_kwh`, `source` and, where the country is known,
        `co2_grams` (CO2 equivalents) and `location`; still empty where codecarbon is not installed or found nothing.

    Source: https://github.com/mlco2/codecarbon (tried with 3.3.2).
    """
    found: dict[str, Any] = {}
    tracker = _tracker() if follow else None
    if tracker is None:
        yield found
        return
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    found |= _read(tracker)


def _tracker() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            return None
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        # By default it writes a file into the working folder; its settings may let it send results and ask for the
        # current mix of a grid.
        return OfflineEmissionsTracker(
            save_to_file=False, save_to_api=False, electricitymaps_api_token="", log_level="critical"
        )


def _read(tracker: Any) -> dict[str, Any]:
    # The tracker hides its own errors: what it could not find out is missing, or zero.
    data = getattr(tracker, "final_emissions_data", None)
    energy, kilograms = (getattr(data, name, None) for name in ("energy_consumed", "emissions"))
    if not _is_measured(energy):
        return {}
    found = {"energy_kwh": energy, "source": f"codecarbon {_version()}".strip()}
    if data.country_name and _is_measured(kilograms):
        found |= {"co2_grams": 1000 * kilograms, "location": data.country_name}
    return found


def _is_measured(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _version() -> str:
    try:
        return importlib.metadata.version("codecarbon")
    except importlib.metadata.PackageNotFoundError:
        return ""
