"""Training of inverter and corrector: state, optimiser, step, checkpoints, and the loop around them."""
