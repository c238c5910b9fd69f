"""Layers that two or more codecs share."""
