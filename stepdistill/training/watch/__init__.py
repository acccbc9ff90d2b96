"""Statistics of student and teacher during training, and what they warn of."""
