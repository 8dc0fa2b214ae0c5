"""The hand-written encoder stack. Reading order: layer, stack, embeddings, then weights and a family file (bert)."""

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.layer import Prefix
from ptv2_engine.encoder.stack import Encoder, check_trained
from ptv2_engine.encoder.weights import FAMILIES, Origin, load_encoder

__all__ = ["FAMILIES", "Encoder", "EncoderConfig", "Origin", "Prefix", "check_trained", "load_encoder"]
