"""Training data: the `Example`, its readers, label construction, cleaning and hard-negative mining."""
