"""Prompts of an exact length in tokens: haystacks, their assembly, passkeys."""

from .passkey_prompts import CLASSIC, SHORT, Wording, passkey

__all__ = ["CLASSIC", "SHORT", "Wording", "passkey"]
