"""Language models of `transformers`: attention hooks, the barrier in training, margins while decoding."""

from probattn.hf.barrier import BarrierHandle, LayerStatistics, attach_barrier
from probattn.hf.decoding import MarginMonitor

__all__ = ["BarrierHandle", "LayerStatistics", "MarginMonitor", "attach_barrier"]
