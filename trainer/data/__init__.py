# Copyright 2026 The AMVL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0
"""Readers and builders of training rows: one file per source, each gives rows in TRL's prompt/completion format."""
