"""`tierctl doctor`: tries out what tierd relies on, and says what to do where it does not work."""
