"""The trainer: its arguments, the run's folder, LoRA, attention of packed rows, and export."""
