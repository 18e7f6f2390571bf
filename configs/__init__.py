"""One experiment a file: `get_config(preset)` with presets `small` and `paper`."""
