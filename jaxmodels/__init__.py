"""What each system computes: pure functions of (parameters, arrays)."""
