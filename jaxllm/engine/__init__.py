"""The engine: the core's loop over steps, the device side of it, and the messages that its clients speak."""
