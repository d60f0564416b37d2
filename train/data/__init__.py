"""From conversations and texts to batches: reading, rendering, tokenizing, packing, sampling."""
