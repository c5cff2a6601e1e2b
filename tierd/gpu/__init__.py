"""The GPUs of a node: their memory, and the threads that talk to them. Importing it loads no GPU
library."""
