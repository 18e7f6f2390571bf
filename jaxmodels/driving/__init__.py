"""Driving: motion forecasting and LiDAR-first detection."""
