"""What is measured: a task in each file, and what tasks share."""
