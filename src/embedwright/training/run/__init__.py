"""What surrounds a step: checkpoints, records, evaluations, signals."""
