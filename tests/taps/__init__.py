"""Tests of the room taps."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.gpu_rows")  # its checks tell what differs, as those of a test do
