"""The `embedwright` command."""
