"""The embedded model, with which everything works without a download. MODEL_CARD.md says what it can do."""

from pathlib import Path


def model_path() -> Path:
    """The path of the model's GGUF."""
    return Path(__file__).with_name("nano.gguf")
