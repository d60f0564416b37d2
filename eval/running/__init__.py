"""A sweep as it runs: lengths, units of work, processes, and answers generated to verify scores."""
