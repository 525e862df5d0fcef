"""The embedded model: everything works with no download. See MODEL_CARD.md for what it can do."""

from pathlib import Path


def model_path() -> Path:
    """Where the model's GGUF lies, in the checkout or installed."""
    return Path(__file__).with_name("nano.gguf")
