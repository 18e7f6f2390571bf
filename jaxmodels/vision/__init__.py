"""Image models; every file opens with its source."""
