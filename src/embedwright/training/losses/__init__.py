"""From vectors to the loss of a batch."""
