"""Language models of `transformers`: layers as attentions, the barrier in training, margins while decoding."""

from probattn.hf.barrier import BarrierHandle, LayerStatistics, attach_barrier
from probattn.hf.decoding import MarginMonitor
from probattn.hf.layers import AttentionLayer, attention_layer
from probattn.hf.margins import margins

__all__ = [
    "AttentionLayer",
    "BarrierHandle",
    "LayerStatistics",
    "MarginMonitor",
    "attach_barrier",
    "attention_layer",
    "margins",
]
