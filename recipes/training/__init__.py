"""Parts of codec training: data, losses, discriminators, code books."""
