"""The lines of a card that load its model, run as they stand."""

import re
from pathlib import Path


def loading_of(card: Path) -> str:
    """The first Python block of a card."""
    return re.search(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]


def load_as_the_card_says(card: Path) -> dict:
    """What the lines define; they are run in the folder above the checkpoint's, where its name means something."""
    names: dict = {}
    exec(compile(loading_of(card), str(card), "exec"), names)
    return names
