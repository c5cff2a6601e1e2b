"""What other systems need to run our models: their files, and processes as the demo has them."""
