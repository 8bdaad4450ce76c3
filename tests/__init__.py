"""Tests, in folders as the rooms are; what several of them need lies here."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
