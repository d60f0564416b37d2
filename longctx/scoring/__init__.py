"""Scores of tokens and prompts without [S, vocab] logits, and greedy decoding."""
