"""The collapse monitor: statistics of student and teacher during training, its warnings, and `stepdistill doctor`."""
