"""A Hub on this machine, to which huggingface_hub's own client is pointed."""

import time
import types

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from tests.support.hub import TOKEN, Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client logs in, keeps its cache in `tmp_path`, and does not wait between its own tries."""
    with Hub(tmp_path / "hub") as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)
        disable_progress_bars()
        yield server
        enable_progress_bars()
        huggingface_hub.close_session()
