"""What leaves a training set: unwanted rows, duplicates, leaks from evaluation data."""
