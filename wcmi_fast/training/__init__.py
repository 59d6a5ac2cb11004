"""The trainer, its settings, checkpoints and run folders."""
