"""What is compared: experiment files, their wiring into simulations, and the command line."""
