# Copyright 2026 The AMVL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0
"""Training rows: readers of many sources, mixtures, reports, and rows made from photographs."""

from .sources import open_source, read_rows


__all__ = ["open_source", "read_rows"]
