"""Data families: TFDS builders and Grain transforms, read as a pure function of the step."""
