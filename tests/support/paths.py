"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
SHARED = ROOT.parent / "shared"
"""Golden values and real data; tests that need them skip if the folder is absent."""
