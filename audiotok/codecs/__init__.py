"""One folder a codec, each read in the same order: configuration, features, modeling, tokenization, conversion."""
