"""The attention sublayers of ``transformers`` models as attentions, with exact blocks of their Jacobian."""

from probattn.hf.layers.build import attention_layer
from probattn.hf.layers.context import LayerContext
from probattn.hf.layers.families import covered
from probattn.hf.layers.layer import AttentionLayer, MeanAndLayerFactors

__all__ = ["AttentionLayer", "LayerContext", "MeanAndLayerFactors", "attention_layer", "covered"]
