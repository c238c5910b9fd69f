"""Programs that train, evaluate and benchmark codecs. Uses only the public API of audiotok."""
