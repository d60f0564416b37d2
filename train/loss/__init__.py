"""What is minimised: cross-entropy, unlikelihood of tokens and sequences, SimCTG's contrast."""
