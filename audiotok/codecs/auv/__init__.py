"""AUV: one nested codebook of 20,480 entries for speech, vocal, music and sound, 50 codes a second at 16 kHz."""

from audiotok.codecs.auv.configuration_auv import AuvConfig
from audiotok.codecs.auv.modeling_auv import AuvModel

__all__ = ["AuvConfig", "AuvModel"]
