"""Tests that need what a machine may lack."""

import pytest

from data_pipelines.embedded import emoji

try:
  emoji.find_files()
  _MISSING = ""
except ValueError as error:
  _MISSING = str(error)
needs_emoji = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)
