"""The pure core: events in, actions out. No clock, I/O, asyncio or randomness."""
