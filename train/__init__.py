"""Fine-tuning of patched models on long inputs."""
