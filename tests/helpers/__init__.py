"""What several test files share: models, settings, an independent specification, and real DeepSpeed launches."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
