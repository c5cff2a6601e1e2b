"""The shell: one module per device or kernel interface."""
