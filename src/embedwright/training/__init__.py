"""Recipe, batches, loss and the loop: two-stage contrastive instruction tuning."""
