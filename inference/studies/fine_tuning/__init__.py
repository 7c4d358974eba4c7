"""Fine-tuning study: a pretrained language model tuned with and without the barrier, on corrupted contexts."""
