"""Vector quantizers: one idea a file."""
