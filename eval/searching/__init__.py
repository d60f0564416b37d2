"""Search for the divisors of longrope by what it does to a model's answers."""
