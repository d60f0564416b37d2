"""Prompts of an exact length in tokens: haystacks, their assembly, passkeys."""
