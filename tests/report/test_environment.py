import json
import os
import platform

import torch

from hfprune.report.environment import environment


def test_versions_machine_device_and_dtype_are_named():
    found = environment("cpu", torch.bfloat16)
    assert found["torch"] == torch.__version__.partition("+")[0] and found["python"] == platform.python_version()
    assert "CPU core" in found["machine"] and found["device"] == "cpu" and found["dtype"] == "bfloat16"
    assert {"hfprune", "transformers", "timm", "platform"} <= set(found)
    assert json.loads(json.dumps(found)) == found


def test_nothing_private_is_told(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    text = json.dumps(environment())
    assert "secret-host" not in text and os.getcwd() not in text and os.path.expanduser("~/") not in text
    assert "dtype" not in environment()
