"""From a loss to updated weights."""
