"""Kills at random moments: every run goes on and ends as one that nobody killed."""

import re
import subprocess
import sys

from tests.support.processes import ROOT


def test_a_short_campaign_of_kills(tmp_path):
    command = [sys.executable, "scripts/fault_campaign.py", "--kills", "6", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for recipe in ("masks", "removal"):
        row = re.search(rf"│ {recipe} +│ +3 │ +3 │ +(\d+) │ +(\d+) │ +0 │", done.stdout)
        assert row and int(row[1]) == int(row[2]) > 0, done.stdout
