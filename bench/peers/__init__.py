"""The engine beside other systems: each in an environment and a process of its own, asked in turn."""
