"""Language models; every file opens with its source."""
