"""The masked phase: masked next-token prediction on plain text, before contrastive training."""
