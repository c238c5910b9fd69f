"""Codecs whose frames are whole with fewer codes: what `num_quantizers` means in a config and in a codec.

The number stands in the config, because facts, vocabulary and layouts hang on it. `with_num_quantizers` gives a codec
of another number without copying weights, and `encode(num_quantizers=)` is the same for one call.
"""

from __future__ import annotations

import copy
from typing import Any, Self

from torch import Tensor

from audiotok.codec import AudioCodec, CodecConfig, CodecOutput
from audiotok.errors import ConfigError


class PrefixConfig(CodecConfig):
    """A config with the key `num_quantizers`, which each family declares in its own place."""

    num_quantizers: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_num_quantizers(self.num_quantizers)
        super().__post_init__(**kwargs)

    @property
    def num_codebooks(self) -> int:
        """Codebooks that there are weights for: the most codes that a frame can have."""
        raise NotImplementedError(f"{type(self).__name__} must say how many codebooks it has.")

    @property
    def num_codes(self) -> int:
        """Codes a frame, at most."""
        return self.num_quantizers or self.num_codebooks

    def check_num_quantizers(self, count: int | None) -> None:
        """Raise `ConfigError` unless `count` is None or a number of codes a frame that there are codebooks for."""
        most = self.num_codebooks
        if count is None or (isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= most):
            return
        raise ConfigError(
            f"num_quantizers={count!r} is not legal: choose 1 to {most}, or None for what the codec was trained for."
        )


class PrefixCodec(AudioCodec):
    """A codec that can give and take the first codes of each frame alone; its stages are those of `quantizer`."""

    config: PrefixConfig  # ty: ignore[incompatible-mutable-override]
    quantizer: Any

    def with_num_quantizers(self, num_quantizers: int | None) -> Self:
        """The same weights, shared and not copied, with `num_quantizers` codes in every frame (None: as trained).

        Raises:
            ConfigError: there are not so many codebooks.
        """
        self.config.check_num_quantizers(num_quantizers)
        same = copy.copy(self)
        same.config = copy.deepcopy(self.config)
        same.config.num_quantizers = num_quantizers
        return same

    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        *,
        num_quantizers: Any = None,
        **options: Any,
    ) -> CodecOutput:
        """As `AudioCodec.encode`, to `num_quantizers` codes a frame in place of the config's number.

        One number; where it is also among `encode_options`, a list of one a clip as well.
        """
        if num_quantizers is None:
            return super().encode(input_values, padding_mask, **options)
        if "num_quantizers" in self.encode_options:
            return super().encode(input_values, padding_mask, num_quantizers=num_quantizers, **options)
        return self.with_num_quantizers(num_quantizers).encode(input_values, padding_mask, **options)

    def codebook_embeddings(self) -> list[Tensor]:
        """The table `[K, d]` of each stage in use."""
        return [stage.codebook.weight for stage in self.quantizer.in_order[: self.config.num_codes]]
