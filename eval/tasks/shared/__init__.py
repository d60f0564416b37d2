"""What tasks share: the protocol, retrieval, haystacks, texts, words; no task stands in here."""
