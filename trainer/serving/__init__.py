"""Serves a checkpoint over transformers' own OpenAI-compatible server, with the latents on."""

from .server import build_app, serve


__all__ = ["build_app", "serve"]
