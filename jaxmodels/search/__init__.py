"""Architecture search: supernets whose sub-networks are arrays, and their search spaces."""
