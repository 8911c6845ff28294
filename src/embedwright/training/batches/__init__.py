"""From a recipe to the texts of step s, and who is whose negative."""
