"""One program for each system: it holds the model and generates when asked. Runs in that system's environment."""
