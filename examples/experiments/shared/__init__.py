"""What the experiments share: results that can be resumed and carry their environment, and images of digits."""
