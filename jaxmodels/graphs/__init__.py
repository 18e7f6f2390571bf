"""Graph networks on padded edge lists, and the systems built on them."""
