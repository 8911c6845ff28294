"""The demo, and training on a user's own pairs with defaults."""
