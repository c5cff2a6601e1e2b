"""A package of its own, or a real cuda-bindings would be found behind this folder."""
