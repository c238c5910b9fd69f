"""Bridges to the tools that audio language models are built with. Uses only the public API of audiotok."""
