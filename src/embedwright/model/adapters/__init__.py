"""LoRA on a backbone."""
